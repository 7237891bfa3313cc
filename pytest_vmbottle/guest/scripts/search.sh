# Searches in files with grep.
# Arguments: the root, seconds, matches, then grep's options.
# Status: 101 if there is no root, 105 if it may not be read, 110 if the pattern is none, 111 if grep is not GNU's; else that of timeout.
# Names may have newlines in them and lines of text may not, so newline and NUL are swapped: then head counts matches. grep alone is under
# the clock, and what comes after it passes on all that it had found. Its status takes a way of its own around the pipe. Of a line, 8200
# bytes are kept: the longest path (PATH_MAX, 4096), and more of the text than is shown. BusyBox's cut would end lines at a NUL: there long
# lines come whole.
[ -e "$1" ] || exit 101
[ -r "$1" ] || exit 105
root=$1 seconds=$2 records=$3; shift 3
grep --null --line-buffered -e x </dev/null >/dev/null 2>&1; [ $? -lt 2 ] || exit 111
grep "$@" </dev/null; [ $? -lt 2 ] || exit 110
# shellcheck disable=SC2209 # the name of a command, which is run later
shorten="cut -b 1-8200"; cut --version >/dev/null 2>&1 || shorten="cat"
exec 3>&1
status=$({ {
  timeout -k 2 "$seconds" grep -rnsIH --null --line-buffered --devices=skip "$@" -- "$root" 2>/dev/null 3>&- 4>&-
  echo $? >&4
} | $shorten | tr '\n\000' '\000\n' | head -n "$records" >&3; } 4>&1)
exit "$status"
