# Runs a command, and says on stderr behind a mark how it ended.
# Input: a line with the mark and a number of bytes; so many bytes, which are the command's words, quoted for a shell; then the command's.
# The command and its environment come before its input: on the host's command line all users could read them, and in the guest whoever
# looks for a process by its words would find this shell. Neither `read` nor dd takes more than is asked for. Of a child that a signal
# ended the shell says what signal that was; dash and BusyBox do, bash does not.
read -r mark size; words=$(dd bs="$size" count=1 iflag=fullblock 2>/dev/null); eval "set -- $words"; cd /
exec 5>&1 3>&2
said=$(exec 2>&1; (exec "$@" >&5 2>&3 3>&- 5>&-); echo " $?")
printf '\036%s%s\n' "$mark" "$said" >&2
