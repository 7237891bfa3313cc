# Makes a folder.
# Arguments: the path, something if it may be there, something if those above it are to be made, the mode.
# Status: 103 if something above it is no folder, for which mkdir has another name.
[ -z "$2" ] || [ ! -d "$1" ] || exit 0
[ -z "$3" ] || mkdir -p "${1%/*}/" || {
  above=$1; while [ ! -e "$above/" ] && [ ! -e "$above" ]; do above=${above%/*}; done
  [ -d "$above/" ] || exit 103 # for which mkdir has another name
  exit 1
}
# With -m the umask does not count, but in pathlib it does.
exec mkdir -m "$(printf %o $((0$4 & ~0$(umask))))" "$1"
