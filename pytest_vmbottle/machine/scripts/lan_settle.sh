# Sets up the card of a LAN. It appears when the guest has noticed it, and gets its final name when udev has seen it.
# Arguments: the address of the card, its IPv4 address with the prefix, the host name, the lines for /etc/hosts.
# Status: 4 if the card could not be given its address.
. ./lan_hosts.sh
mac=$1 address=$2 name=$3
card() {
  for each in /sys/class/net/*; do
    read -r found 2>/dev/null < "$each/address" && [ "$found" = "$mac" ] && [ -e "$each/device" ] && card=${each##*/} && return 0
  done
  return 1
}
until card; do sleep 0.1; done
if command -v udevadm >/dev/null; then udevadm settle --timeout=20; card; fi
ip link set dev "$card" up || exit 4
ip addr show dev "$card" | grep -qF " $address " || ip addr add "$address" dev "$card" || exit 4
echo "$name" > /proc/sys/kernel/hostname && echo "$name" > /etc/hostname
hosts "$4"
