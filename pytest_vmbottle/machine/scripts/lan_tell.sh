# Has the guest know who is on the LAN.
# Arguments: the lines for /etc/hosts.
. ./lan_hosts.sh
hosts "$1"
