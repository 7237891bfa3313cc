# Renames as rename(2) does. mv would copy to another file system, move into a folder, and take a symbolic link to a folder for one.
# Arguments: the path, the new path.
# Status: 102 if only that is a folder, 103 if only this is one, 107 if they are on two file systems, 108 if it would be within itself.
is_dir() { [ -d "$1" ] && [ ! -L "$1" ]; }
device=$(stat -c %d "$1") || exit 1
there=$(stat -c %d "${2%/*}/") || exit 1
[ "$device" = "$there" ] || exit 107
case $2 in "$1"/*) exit 108 ;; esac
if is_dir "$2"; then
  is_dir "$1" || exit 102
  rmdir "$2" || exit 1
elif is_dir "$1"; then
  [ ! -e "$2" ] && [ ! -L "$2" ] || exit 103
fi
if [ -L "$1" ] || [ -L "$2" ] && [ -e "$2" ]; then # mv looks at what they lead to: GNU's for the same file, BusyBox's for a folder
  mv -fT "$1" "$2" 2> /dev/null && exit
  unlink "$2" || exit 1
fi
exec mv -fT "$1" "$2"
