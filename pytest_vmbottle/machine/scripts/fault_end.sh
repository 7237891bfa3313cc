# Ends what holds a fault, and waits for it. Arguments: its process id, and the token in its command line.
# Nothing is done if that process is another one by now: the guest was rebooted.
holds() { tr '\0' '\n' <"/proc/$1/cmdline" | grep -qx -e "$2"; }
holds "$1" "$2" 2>/dev/null || exit 0
kill "$1"
while holds "$1" "$2" 2>/dev/null; do sleep 0.02 || sleep 1; done
