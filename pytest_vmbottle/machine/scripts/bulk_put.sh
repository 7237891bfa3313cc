# Runs a command with the first bytes of a disk as its input: all but the rest by dd, whose blocks are large; `head` would take as long as
# the network.
# Arguments: as of bulk_disk.sh.
. ./bulk_disk.sh
{ dd bs=1048576 count=$((size / 1048576)) 2>/dev/null; head -c $((size % 1048576)); } <"$disk" | "$@"
