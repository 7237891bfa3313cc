# Waits until disks that were plugged in are there, with their names. Arguments: their serial numbers.
for serial do
  until grep -qsx -e "$serial" /sys/block/*/serial; do sleep 0.05 || sleep 1; done
  # Names by serial number are udev's, which a guest may not have.
  [ ! -S /run/udev/control ] || until [ -e "/dev/disk/by-id/virtio-$serial" ]; do sleep 0.05 || sleep 1; done
done
