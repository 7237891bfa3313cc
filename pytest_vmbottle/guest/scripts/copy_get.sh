# Packs a file or tree to its output. Of GNU's tar, status 1 says that a file grew or went meanwhile, as logs do.
# Arguments: the path, tar's blocking factor or nothing, something if tar is GNU's, and then options for GNU's tar.
path=$1 blocks=${2:-20} gnu=$3; shift 3
cd "${path%/*}/" || exit
if [ -n "$gnu" ]; then tar -b "$blocks" -cSf - "$@" "./${path##*/}"; else tar -cf - "./${path##*/}"; fi
status=$?; [ "$status$gnu" = 11 ] && exit 0
exit $status
