#!/bin/sh
# cloud-init takes most of a boot: four programs, each of which imports a great deal. What every machine needs of it, its name and its keys,
# is taken from the same seed by this, before the network is up, and once, as cloud-init does. No image has a host key.
set -eu
seed=/run/vmbottle-seed
mkdir -m 0700 "$seed"
mount -t iso9660 -o ro /dev/disk/by-label/cidata "$seed"
cat "$seed/hostname" > /etc/hostname
cat "$seed/hostname" > /proc/sys/kernel/hostname
/lib/systemd/systemd-growfs / # the disk may be larger than the image
umask 077
mkdir -p /root/.ssh
cat "$seed/authorized-keys" >> /root/.ssh/authorized_keys
(umask 022 && cat "$seed/host-key-public" > /etc/ssh/ssh_host_ed25519_key.pub)
cat "$seed/host-key" > /etc/ssh/ssh_host_ed25519_key # the last: it says that all is done
umount "$seed"
rmdir "$seed"
