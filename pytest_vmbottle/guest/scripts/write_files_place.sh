# Places what is staged, by its folders, each after the one that it is in.
# Arguments: the staged folders. Environment: what write_files.sh exports.
. ./write_files_fail.sh
make() {
  [ ! -d "$1/" ] || return 0
  make "${1%/*}"
  mkdir "$1" || fail "$1"
  [ -z "$owner" ] || chown -- "$owner" "$1" || fail "$1"
}
for new do
  # shellcheck disable=SC2154 # write_files.sh exports `top`
  folder=$top; [ "$new" = . ] || folder=$top/${new#./}
  make "$folder"
  export folder
  find "$new" -mindepth 1 -maxdepth 1 -type f -exec sh -c 'eval "$move"' sh {} + || exit 1
done
