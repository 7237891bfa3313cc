# Sets `pids` to the processes of the first argument: a unit, or a process. Status: 1 if there are none.
case $1 in
*[!0-9]*)
  group=$(systemctl show -p ControlGroup --value "$1")
  pids=
  [ -z "$group" ] || pids=$(find "/sys/fs/cgroup$group" -name cgroup.procs -exec cat {} +)
  ;;
*) pids=$1 ;;
esac
[ -n "$pids" ] || { echo "there are no processes of $1" >&2; exit 1; }
