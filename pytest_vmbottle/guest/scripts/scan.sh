# Lists what is in a folder; each path has a letter for its kind, its size, mode and time before it, and a NUL behind it.
# BusyBox's find does not know the three, so there are question marks in their place.
# Arguments: the folder, the depth or nothing, -L to follow symbolic links or nothing. Status: 105 if it may not be read.
stat -L "$1/" > /dev/null || exit 1
[ -r "$1/" ] || exit 105
# shellcheck disable=SC2086 # $3 may be no word at all
set -- "$3" "$1/" -mindepth 1 ${2:+-maxdepth "$2"}
follow=$1
shift
# shellcheck disable=SC2086
if find "$1" -maxdepth 0 -printf '' 2>/dev/null; then
  exec find $follow "$@" -printf '%y %s %m %T@ %p\0'
fi
# shellcheck disable=SC2086
exec find $follow "$@" \
  -type d -exec printf 'd ? ? ? %s\0' {} + -o \
  -type l -exec printf 'l ? ? ? %s\0' {} + -o \
  -type f -exec printf 'f ? ? ? %s\0' {} + -o \
  -type p -exec printf 'p ? ? ? %s\0' {} + -o \
  -type s -exec printf 's ? ? ? %s\0' {} + -o \
  -type b -exec printf 'b ? ? ? %s\0' {} + -o \
  -type c -exec printf 'c ? ? ? %s\0' {} +
