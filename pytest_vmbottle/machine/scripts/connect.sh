# Connects to a TCP port, with whatever the guest has for that, and closes the connection again.
# Arguments: a name or an address, and the port. Status: 0 if it was reached, 127 if there is no program to try it with.
if command -v bash >/dev/null; then
  # shellcheck disable=SC2016 # for the other shell
  exec timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$1" "$2"
elif command -v nc >/dev/null; then
  exec nc -z -w 5 "$1" "$2"
elif command -v python3 >/dev/null; then
  exec python3 -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)' "$1" "$2"
fi
echo "there is none of bash, nc and python3 to connect with" >&2
exit 127
