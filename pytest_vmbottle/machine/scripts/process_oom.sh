# Has the OOM killer end one of several processes, and waits until it has. Argument: a unit or a process.
. ./process_list.sh
for pid in $pids; do echo 1000 >"/proc/$pid/oom_score_adj"; done
echo f >/proc/sysrq-trigger
while :; do
  for pid in $pids; do kill -0 "$pid" 2>/dev/null || exit 0; done
  sleep 0.05 || sleep 1
done
