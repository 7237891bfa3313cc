# Unpacks a tar stream, its input, and puts what was in it into its place.
# Arguments: the destination, the source's name, a name that is not there yet, tar's blocking factor or nothing (not every tar has one), and
# something if the destination is meant itself.
# Status: 102 if a file would take the place of a folder, 103 the other way round.
# A destination that is a folder means a place in it. A folder that is there already is merged into, file by file, each by a rename. Of a
# full disk tar may say "Wrote only 512 of 1048576 bytes"; the probe has it named.
path=$1; [ -z "$5" ] && [ -d "$path" ] && path=${path%/}/$2
parent=${path%/*}; [ -d "$parent/" ] || { stat -L "$parent/" > /dev/null; exit 1; }
new=$parent/$3
mkdir -m 700 "$new" || exit 1
trap 'rm -rf "$new"' EXIT
blocks=; [ -n "$4" ] && tar --version 2>/dev/null | grep -q GNU && blocks="-b $4"
# shellcheck disable=SC2086 # two words or none
tar $blocks -xpf - -C "$new" || { head -c 1048576 /dev/zero > "$new/probe"; exit 1; }
if [ ! -d "$new/$2" ] || [ -L "$new/$2" ]; then
  [ -d "$path" ] && exit 102
  mv -f "$new/$2" "$path"; exit
fi
[ -d "$path" ] || { [ -e "$path" ] && exit 103; mv "$new/$2" "$path"; exit; }
cd "$new/$2" || exit 1
find . -type d -exec sh -c 'for d do mkdir -p "$0/$d" || exit 1; done' "$path" {} + &&
find . ! -type d -exec sh -c 'for f do mv -f "$f" "$0/$f" || exit 1; done' "$path" {} +
