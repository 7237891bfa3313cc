# Moves the files of one folder, `folder`. They are renamed together, but for those that have a symbolic link's name: these go where it
# leads.
# Arguments: the staged files.
. ./write_files_fail.sh
. ./follow.sh
for new do
  shift
  # shellcheck disable=SC2154 # write_files_place.sh exports `folder`
  follow "$folder/${new##*/}"
  if [ "$path" = "$folder/${new##*/}" ]; then set -- "$@" "$new"; else mv -f "$new" "$path" || fail "$path"; fi
done
[ $# -eq 0 ] || mv -f "$@" "$folder/" || fail "$folder/${1##*/}"
