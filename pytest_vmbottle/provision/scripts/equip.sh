# Installs what a machine is woken and spoken to by, where an image was not made with it: Debian, Fedora, Alpine and openSUSE name it alike.
set --
command -v python3 >/dev/null || set -- python3
command -v qemu-ga >/dev/null || set -- "$@" qemu-guest-agent
[ $# -gt 0 ] || exit 0
(
. ./install.sh
) || exit
if command -v systemctl >/dev/null; then
  # The agent's unit may want its port as a device of systemd's, for which udev has to see the port once more, by the package's rules.
  udevadm control --reload && udevadm trigger --settle --subsystem-match=virtio-ports
  systemctl start qemu-guest-agent
else rc-update add qemu-guest-agent && rc-service qemu-guest-agent start; fi
