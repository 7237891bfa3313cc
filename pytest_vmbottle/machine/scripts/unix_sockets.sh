# Prints the paths of the unix sockets that take connections or datagrams. Argument: a path, or @ and an abstract name.
# Status: 0 if that one is among them.
there=1
# The columns: flags 00010000 are those of a socket that listens (__SO_ACCEPTCON), and type 0002 is one for datagrams.
while read -r _ _ _ flags type _ _ path; do
  case $flags-$type in
    00010000-* | *-0002) ;;
    *) continue ;;
  esac
  [ -n "$path" ] || continue
  echo "$path"
  # One socket has many paths: /var/run is /run. BusyBox and dash know -ef, too.
  # shellcheck disable=SC3013
  if [ "$path" = "$1" ] || [ "$path" -ef "$1" ]; then there=0; fi
done </proc/net/unix
exit "$there"
