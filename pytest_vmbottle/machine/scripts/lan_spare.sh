# Tells who sets up network cards in the guest to leave ours alone: it would ask for an address by DHCP, and take ours away.
# Arguments: the addresses of the cards. Status: 3 if there is no `ip`.
command -v ip >/dev/null || exit 3
if [ -d /run/systemd/netif ]; then
  mkdir -p /run/systemd/network
  printf '[Match]\nMACAddress=%s\n\n[Link]\nUnmanaged=yes\n' "$*" > /run/systemd/network/00-vmbottle-lan.network
  networkctl reload || true
fi
if [ -d /run/NetworkManager ]; then
  mkdir -p /run/NetworkManager/conf.d
  { printf '[keyfile]\nunmanaged-devices='; printf ';mac:%s' "$@" | cut -c2-; } > /run/NetworkManager/conf.d/00-vmbottle-lan.conf
  nmcli general reload conf || true
fi
