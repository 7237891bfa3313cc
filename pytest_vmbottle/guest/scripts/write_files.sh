# Writes many files from a tar stream, its input.
# Arguments: something to empty the folders first, the mode and the owner or nothing, the scripts write_files_check.sh, write_files_place.sh
# and write_files_move.sh, then the folders.
# Status: 110 if a folder that the guest needs would be emptied.
# All is unpacked beside where it is to go, and checked, before anything that is there is touched. The folders that it goes to are words,
# and the tar stream has a number in place of each: a symbolic link leads from there to its stage.
. ./write_files_fail.sh
. ./write_files_vital.sh
clean=$1 mode=$2 owner=$3 check=$4 place=$5 move=$6; shift 6
export clean mode owner check place move top # as words of find's, they could not have {} in them
for top do
  # shellcheck disable=SC2015 # whichever of them fails
  [ -n "$clean" ] && [ -d "$top" ] || continue
  # By its real path, because a symbolic link may lead to a folder that the guest needs.
  real=$(cd -P "$top" && pwd -P && echo .) || fail "$top"
  ! vital "${real%?.}" || { printf '%s\0' "$top"; exit 110; }
done
links=$(mktemp -d) || fail ''
# shellcheck disable=SC2154 # `link` is assigned where the trap runs
trap 'for link in "$links"/*; do rm -rf "$(readlink "$link")"; done; rm -rf "$links"' EXIT
count=0
for top do
  base=$top
  while [ ! -d "$base/" ]; do [ ! -e "$base" ] || fail "$base" "Not a directory"; base=${base%/*}; done
  stage=$(mktemp -d "$base/.vmbottle.XXXXXXXX") || fail "$top"
  ln -s "$stage" "$links/$count" || fail "$top"
  count=$((count + 1))
done
# Without owners and times: the files are new, and belong to the user who writes them.
tar -xomf - -C "$links" || exit 1
files() { find "$links"/*/ -type f -exec "$@" {} + || fail ''; }
if [ -n "$mode" ]; then files chmod "$mode"
else
  run() { find "$links"/*/ -type f "$@" || fail ''; }
  run ! -perm -100 -exec chmod "$(printf %o $((0666 & ~0$(umask))))" {} +
  run -perm -100 -exec chmod "$(printf %o $((0777 & ~0$(umask))))" {} +
fi
[ -z "$owner" ] || files chown -- "$owner"
each() {
  step=$1; shift; count=0
  for top do
    stage=$(readlink "$links/$count"); count=$((count + 1))
    cd "$stage" || fail "$top"
    "$step"
  done
}
check() { find . -exec sh -c 'eval "$check"' sh {} + || exit 1; }
place() { find . -type d -exec sh -c 'eval "$place"' sh {} + || exit 1; }
# Neither the stage, which lies in the folder that is emptied, nor other file systems.
old() { find . -xdev -mindepth 1 -depth ! -path "./${stage##*/}" ! -path "./${stage##*/}/*" "$@"; }
empty() {
  [ -d "$top" ] || return 0
  cd -P "$top" || fail "$top"
  # shellcheck disable=SC2015 # whichever of them fails
  old ! -type d -exec rm -f {} + && old -type d -exec rmdir {} + || fail "$top"
}
each check "$@"
for list in "$links"/.modes/*; do
  [ ! -e "$list" ] || (cd "$links" && xargs -0 chmod "${list##*/}" <"$list") || fail ''
done
[ -z "$clean" ] || each empty "$@"
each place "$@"
[ -z "$(find "$links"/*/ -type f)" ] || fail '' "not all of it could be placed"
cd /
