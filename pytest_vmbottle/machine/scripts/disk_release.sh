# Unmounts what is on a disk, so that it can be pulled out. Argument: its serial number. Status: 1 if something still uses it.
disk=$(grep -lsx -e "$1" /sys/block/*/serial) || exit 0
disk=${disk%/serial}
# The last one first, since it may lie below another one.
sed -n "s|^/dev/${disk##*/}[0-9]* \([^ ]*\) .*|\1|p" /proc/mounts | sort -r | while read -r folder; do
  umount "$(printf %b "$folder")" || exit 1
done || exit 1
# Whatever is mapped to it (LVM, dm-crypt) would go on without it.
for holder in "$disk"/holders/*; do [ ! -e "$holder" ] || exit 1; done
