# Writes its input to a file.
# Arguments: the path, how many bytes there are, the mode and the owner or nothing. Status: 102 if it is a folder.
# Written beside it and renamed, so that nobody reads half of it. A symbolic link is written through and a file keeps its mode and owner, as
# with open(2). Where that cannot be done it is written in place: what is no regular file, the files of others, /proc and /sys.
. ./follow.sh
path=$1 mode=$3 owner=$4
follow "$path"
[ -d "$path" ] && exit 102
new=$path
if [ ! -e "$path" ] || { [ -f "$path" ] && { [ -O "$path" ] || [ "$(id -u)" = 0 ]; }; }; then
  new=$(mktemp "${path%/*}/.vmbottle.XXXXXXXX" 2>&1) || {
    case $([ -w "$path" ] && echo "$new") in
      *denied | *permitted | *directory) new=$path ;;
      *) echo "$new" >&2; exit 1 ;;
    esac
  }
fi
[ "$new" = "$path" ] || trap 'rm -f "$new"' EXIT
cat > "$new" || exit 1
if [ "$new" != "$path" ]; then
  # Where a connection is lost, the input just ends, and cat is content.
  [ "$(wc -c < "$new")" -eq "$2" ] || { echo "only a part of it arrived" >&2; exit 1; }
  if [ -e "$path" ]; then : "${owner:=$(stat -c %u:%g "$path")}" "${mode:=$(stat -c %a "$path")}"
  else : "${mode:=$(printf %o $((0666 & ~0$(umask))))}"; fi
fi
[ -z "$owner" ] || chown -- "$owner" "$new" || exit 1
[ -z "$mode" ] || chmod "$mode" "$new" || exit 1
[ "$new" = "$path" ] || mv -f "$new" "$path" # no exec: it would skip the trap
