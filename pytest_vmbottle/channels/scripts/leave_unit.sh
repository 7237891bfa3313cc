# Moves the agent, whose child this is, out of its unit's control group, and with it what it starts from now on. What befalls the unit is
# then not the end of that (KillMode= in systemd.service), nor what the OOM killer does to that the end of the unit (OOMPolicy=).
group=/sys/fs/cgroup/vmbottle
[ -e /sys/fs/cgroup/cgroup.procs ] || exit 0
[ -d $group ] || mkdir $group
echo $PPID >$group/cgroup.procs
