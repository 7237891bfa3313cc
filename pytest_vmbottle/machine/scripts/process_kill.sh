# Sends a signal to processes. Arguments: a unit or a process, then the signal.
. ./process_list.sh
# shellcheck disable=SC2086 # several words
exec kill -s "$2" $pids
