# Lists what is in a folder; each path has a letter for its kind before it and a NUL behind it.
# Arguments: the folder, the depth or nothing, -L to follow symbolic links or nothing. Status: 105 if it may not be read.
stat -L "$1/" > /dev/null || exit 1
[ -r "$1/" ] || exit 105
# shellcheck disable=SC2086 # $3 may be no word at all
exec find $3 "$1/" -mindepth 1 ${2:+-maxdepth "$2"} \
  -type d -exec printf 'd%s\0' {} + -o \
  -type l -exec printf 'l%s\0' {} + -o \
  -type f -exec printf 'f%s\0' {} + -o \
  -type p -exec printf 'p%s\0' {} + -o \
  -type s -exec printf 's%s\0' {} + -o \
  -type b -exec printf 'b%s\0' {} + -o \
  -type c -exec printf 'c%s\0' {} +
