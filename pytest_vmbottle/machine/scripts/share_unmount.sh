# Unmounts a shared folder, if it is mounted.
# Arguments: its path.
grep -q " $1 virtiofs " /proc/mounts || exit 0
exec umount "$1"
