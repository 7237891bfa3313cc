# Runs a command that writes to a disk, and prints how many bytes it wrote.
# Arguments: as of bulk_disk.sh.
# The file description's own position tells how much was written. The disk is synced before it goes, or the last of it would be missing.
. ./bulk_disk.sh
exec 3<>"$disk"; "$@" >&3 || exit
sync "$disk" 2>/dev/null || sync
exec sed -n 's/^pos:[^0-9]*//p' /proc/$$/fdinfo/3
