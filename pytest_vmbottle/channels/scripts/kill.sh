# Sends a signal to a command and to all that it has started.
# Arguments: the command's tag, the signal's name. Status: 3 if there was nothing to send it to.
# They are found by the control group that the runner has made for it and by the number of its login, or else by its mark in their
# environments. For SIGKILL until nothing is left: all are stopped first, so that none goes on because of another's end. The agents have the
# number of what they started last.
tag=$1 signal=$2 status=3 group=/sys/fs/cgroup/vmbottle/$tag
# shellcheck disable=SC2034 # it only counts
for round in 1 2 3 4 5 6 7 8; do
  found=$(grep -lsxe "$tag" /proc/[0-9]*/loginuid | sed s/loginuid/stat/ | xargs -r grep -Lse ') [ZX] ' -e '^[0-9]* (qemu-ga) ' -e '^[0-9]* (vmbottle-runner) ')
  # Below it too, for what makes groups of its own.
  inside=$(find "$group" -name cgroup.procs -exec cat {} + 2>/dev/null)
  # Its status, which does not count, also tells of processes that were gone meanwhile.
  [ -n "$found$inside" ] || found=$(grep -ls "VMBOTTLE_EXEC=$tag" /proc/[0-9]*/environ)
  [ -n "$found$inside" ] || exit $status
  set --; status=0
  for file in $found; do pid=${file#/proc/}; set -- "$@" "${pid%/*}"; done
  for pid in $inside; do case " $* " in *" $pid "*) ;; *) set -- "$@" "$pid" ;; esac; done
  [ "$signal" != KILL ] || kill -s STOP "$@" 2>/dev/null
  kill -s "$signal" "$@" 2>/dev/null
  [ "$signal" = KILL ] || exit 0
done
