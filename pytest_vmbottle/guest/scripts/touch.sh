# Makes an empty file, or gives one the time of now.
# Arguments: the path, the mode, something if it may be there. Status: 104 if it may not, and is.
[ -n "$3" ] || { [ ! -e "$1" ] && [ ! -L "$1" ]; } || exit 104
[ ! -e "$1" ] || exec touch "$1"
touch "$1" && exec chmod "$(printf %o $((0$2 & ~0$(umask))))" "$1"
