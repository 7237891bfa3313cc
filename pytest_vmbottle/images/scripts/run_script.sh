# Run by the host's shell, with the new system's folder: it sees nothing else that a user wrote. Names are resolved as on the host for as
# long as the script runs.
# Arguments: the folder. The script lies in it as /vmbottle-script.
cp -a "$1/etc/resolv.conf" "$1/vmbottle-script.resolv"
cat /etc/resolv.conf > "$1/etc/resolv.conf"
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    chroot "$1" "/vmbottle-script" </dev/null || { echo "the script ended with status $?"; exit 1; }
mv "$1/vmbottle-script.resolv" "$1/etc/resolv.conf"
rm "$1/vmbottle-script"
