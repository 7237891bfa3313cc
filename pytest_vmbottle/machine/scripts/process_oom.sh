# Has the OOM killer end one of several processes, and waits until it has. Argument: a unit or a process.
. ./process_list.sh
[ -w /proc/sysrq-trigger ] || { echo "this kernel has no SysRq, by which its OOM killer is called" >&2; exit 1; }
for pid in $pids; do echo 1000 >"/proc/$pid/oom_score_adj"; done
echo f >/proc/sysrq-trigger
while :; do
  for pid in $pids; do kill -0 "$pid" 2>/dev/null || exit 0; done
  sleep 0.05 || sleep 1
done
