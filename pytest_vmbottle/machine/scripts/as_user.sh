# Runs a command as another user, with that user's environment.
# Arguments: the user, then the command. Status: 125 if there is no such user, else the command's.
user=$1; shift
home=$(getent passwd "$user" | cut -d: -f6)
[ -n "$home" ] || { echo "there is no user $user in the guest" >&2; exit 125; }
set -- env HOME="$home" USER="$user" LOGNAME="$user" "$@"
command -v runuser >/dev/null && exec runuser -u "$user" -- "$@"
exec su -s /bin/sh "$user" -c 'exec "$@"' sh "$@" # as BusyBox has it
