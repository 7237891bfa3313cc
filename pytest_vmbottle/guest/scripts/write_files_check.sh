# Checks that all that is staged for the folder `top` can be placed, and gives it the owner and mode of what it takes the place of.
# Arguments: the staged paths. Environment: what write_files.sh exports.
. ./write_files_fail.sh
. ./follow.sh
for new do
  # shellcheck disable=SC2154 # write_files.sh exports `top`
  follow "$top/${new#./}"
  if [ -d "$new" ]; then
    [ -n "$clean" ] || [ -d "$path" ] || [ ! -e "$path" ] || fail "$path" "Not a directory"
  elif [ -z "$clean" ] && [ -e "$path" ]; then
    [ ! -d "$path" ] || fail "$path" "Is a directory"
    [ -f "$path" ] || fail "$path" "File exists"
    [ -n "$owner" ] || chown "$(stat -c %u:%g "$path")" "$new" || fail "$path"
    run=; [ ! -x "$new" ] || run=+x # what was executable on the host is so here too
    # shellcheck disable=SC2015 # whichever of them fails
    [ -n "$mode" ] || chmod "$(stat -c %a "$path")" "$new" && { [ -z "$run" ] || [ -n "$mode" ] || chmod "$run" "$new"; } || fail "$path"
  fi
done
