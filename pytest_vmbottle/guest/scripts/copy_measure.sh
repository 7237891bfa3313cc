# Prints a tree's kilobytes with all holes filled, its number of entries, and whether tar is GNU's, which can leave the holes out.
# Arguments: the path.
[ -e "$1" ] || [ -L "$1" ] || { stat "$1" > /dev/null; exit 1; }
size=$(du -sk --apparent-size -- "$1" 2>/dev/null || du -sk -- "$1" 2>/dev/null)
[ -n "$size" ] || exit 1
if tar --version 2>/dev/null | grep -q GNU; then gnu=1; else gnu=; fi
echo "${size%%[!0-9]*} $(find "$1" | wc -l) $gnu"
