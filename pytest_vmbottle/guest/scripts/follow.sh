# Defines `follow PATH`, which sets `path` to what symbolic links lead to, there or not. BusyBox takes `readlink -f` of what is not there
# from the wrong folder.
follow() {
  path=$1 links=0
  while [ -L "$path" ]; do
    # The kernel follows 40 too, see path_resolution(7). Beyond that stat(1) says what is wrong.
    links=$((links + 1)); [ "$links" -le 40 ] || { stat -L "$1" > /dev/null; exit 1; }
    # The full stop keeps line breaks at the end of a name, which the shell would remove.
    to=$(readlink "$path" && echo .) || exit 1
    to=${to%?.}
    case $to in /*) path=$to ;; *) path=${path%/*}/$to ;; esac
  done
}
