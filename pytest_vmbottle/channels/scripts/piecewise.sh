# Runs a command whose output is fetched piece by piece.
# Arguments: the path that its files begin with, and a mark. Then, to start it: seconds to wait for its end, and the command.
# It prints the output that there is so far, and as the last line of stderr the mark and the status, or `-` if there may be more.
# The files: FIFOs of both streams (.o, .e), one to wait for its end at (.w), and one that its keeper waits at (.g); its keeper's
# process id (.p), and the status (.s).
files=$1 mark=$2
shift 2
if [ $# -gt 0 ]; then
  seconds=$1
  shift
  umask 077
  mkfifo "$files.o" "$files.e" "$files.w" "$files.g" || exit 125
  # Open for both, so that nobody waits for another end: neither who opens one end below, nor who writes.
  exec 4<>"$files.o" 5<>"$files.e" 6<>"$files.w"
  (
    # The keeper: a FIFO whose reader is gone would lose what is in it, and end who writes to it.
    exec 7<"$files.o" 8<"$files.e" 4>&- 5>&-
    env "$@" </dev/null >"$files.o" 2>"$files.e" 6>&- 7<&- 8<&-
    echo $? >"$files.s"
    echo >&6
    read -r _ <"$files.g"
  ) </dev/null >/dev/null 2>&1 &
  echo $! >"$files.p"
  (
    exec 4>&- 5>&-
    sleep "$seconds"
    echo >&6
  ) </dev/null >/dev/null 2>&1 &
  timer=$!
  exec 4>&- 5>&-
  read -r _ <&6
  exec 6>&-
  kill "$timer" 2>/dev/null
fi

# Looked for first: what was written before the end is in the FIFOs by now.
status=
[ ! -s "$files.s" ] || read -r status <"$files.s"

# Reads a FIFO until it is empty; the status is 0 if nobody can write to it any more.
drain() {
  # dd tells an empty FIFO (EAGAIN, status 1) from one without writers (status 0). After 64 pieces it has not seen the end.
  pieces=$(LC_ALL=C dd if="$1" iflag=nonblock bs=65536 count=64 2>&1 >&3) || return 1
  # Some versions warn of a short read in a line of its own, before the one that counts: "12+34 records in".
  pieces=${pieces%% records in*} pieces=${pieces##*
}
  whole=${pieces%%+*} rest=${pieces#*+}
  [ $((whole + ${rest%% *})) -lt 64 ]
}

drain "$files.o" 3>&1 || status=
drain "$files.e" 3>&2 || status=
if [ -n "$status" ]; then
  echo >"$files.g"
elif [ ! -s "$files.s" ] && read -r keeper <"$files.p" && ! kill -0 "$keeper" 2>/dev/null; then
  status=137 # it was killed with all that it had started, and the keeper is one of that
fi
[ -z "$status" ] || rm -f "$files.o" "$files.e" "$files.w" "$files.g" "$files.s" "$files.p"
printf '%s %s\n' "$mark" "${status:--}" >&2
