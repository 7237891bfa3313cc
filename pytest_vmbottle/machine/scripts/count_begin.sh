# Makes a control group, and has programs begin at the same addresses each time: with others, equal work takes up to 1 % more or less.
# Argument: its path below the root of control groups. Prints what the setting was.
root=/sys/fs/cgroup setting=/proc/sys/kernel/randomize_va_space
[ -e $root/cgroup.procs ] || { echo "it has no control groups of version 2" >&2; exit 1; }
mkdir "$root$1" && cat $setting && echo 0 >$setting
