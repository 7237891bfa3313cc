# Runs a command that knows by itself where its input ends, with a disk as its input.
# Arguments: as of bulk_disk.sh.
. ./bulk_disk.sh
exec "$@" <"$disk"
