# Prints the processor time of a control group in microseconds, removes the group, and restores the setting of addresses.
# Arguments: its path below the root of control groups, and the setting.
group=/sys/fs/cgroup$1
while read -r name value; do
  [ "$name" != usage_usec ] || echo "$value"
done <"$group/cpu.stat"
# What still runs in the background goes on elsewhere.
while read -r pid; do echo "$pid" >"${group%/*}/cgroup.procs"; done <"$group/cgroup.procs" 2>/dev/null
echo "$2" >/proc/sys/kernel/randomize_va_space
rmdir "$group"
