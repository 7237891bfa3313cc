# Starts a login shell on this terminal.
# Arguments: the user.
# shellcheck disable=SC2164 # who cannot enter his home stays in /
cd / 2>/dev/null; home=$(getent passwd "$1" | cut -d: -f6); [ -z "$home" ] || cd "$home" 2>/dev/null
if [ "$1" = root ]; then export HOME="${home:-/root}" USER=root LOGNAME=root; exec "${SHELL:-/bin/sh}" -l; fi
exec su - "$1"
