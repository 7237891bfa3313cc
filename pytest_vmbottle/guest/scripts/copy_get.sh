# Packs a file or tree to its output. Of GNU's tar, status 1 says that a file grew or went meanwhile, as logs do.
# Arguments: the path, tar's blocking factor or nothing, something if tar is GNU's.
cd "${1%/*}/" || exit
if [ -n "$3" ]; then tar -b "${2:-20}" -cSf - "./${1##*/}"; else tar -cf - "./${1##*/}"; fi
status=$?; [ "$status$3" = 11 ] && exit 0
exit $status
