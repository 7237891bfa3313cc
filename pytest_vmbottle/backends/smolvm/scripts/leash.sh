# Kills a process once its own input ends; on the host.
# Arguments: the process, and when it began, in the kernel's ticks since it was booted: never another one with the same number.
read -r _
began=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20)
[ "$began" = "$2" ] && kill -KILL "$1"
