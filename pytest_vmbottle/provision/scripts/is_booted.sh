# Succeeds once the guest has started all there is.
# cloud-init has ended, well or badly, when it has written its result: it is the last to do so. Where it is not there, or disabled, systemd
# says when it has started all there is. A guest that is otherwise in a sorry state is still the one that was asked for.
if command -v cloud-init && ! [ -e /run/cloud-init/disabled ] && ! [ -e /etc/cloud/cloud-init.disabled ]; then
    [ -e /run/cloud-init/result.json ] || systemctl is-failed cloud-final.service
elif [ -d /run/systemd/system ]; then
    case $(systemctl is-system-running) in initializing | starting) false ;; esac
fi >/dev/null
