# Finds a disk that was plugged in: it is there a moment later. Sets `disk` and `size`, and leaves the command.
# Arguments: the disk's serial number, bytes, then a command. Status: 79 if no disk came up, which no command of ours ends with.
# shellcheck disable=SC2034 # `size` is for who includes this
serial=$1 size=$2; shift 2; n=0
until disk=$(grep -lsx -e "$serial" /sys/block/*/serial); do
  n=$((n + 1)); [ $n -le 100 ] || exit 79; sleep 0.1 || sleep 1
done
name=${disk#/sys/block/}; name=${name%/serial}; disk=/dev/$name
until [ -b "$disk" ]; do n=$((n + 1)); [ $n -le 100 ] || exit 79; sleep 0.1 || sleep 1; done
echo 4096 > "/sys/block/$name/queue/read_ahead_kb"
