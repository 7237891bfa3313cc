# Defines `vital PATH`: what a guest cannot do without is never emptied.
vital() {
  case $1 in
    /usr/local/?*/?* | /usr/share/?*/?* | /usr/src/?*) return 1 ;;
    / | /bin | /bin/* | /boot | /boot/* | /dev | /dev/* | /etc | /home | /lib | /lib/* | /lib32* | /lib64* | /libx32* | /media | /mnt) ;;
    /opt | /proc | /proc/* | /root | /run | /sbin | /sbin/* | /srv | /sys | /sys/* | /tmp | /usr | /usr/* | /var) ;;
    /var/backups | /var/cache | /var/lib | /var/local | /var/lock | /var/log | /var/mail | /var/opt | /var/run | /var/spool | /var/tmp) ;;
    *) return 1 ;;
  esac
}
