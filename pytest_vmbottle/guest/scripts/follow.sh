# Defines `follow PATH`, which sets `path` to what symbolic links lead to, there or not. BusyBox takes `readlink -f` of what is not there
# from the wrong folder.
follow() {
  path=$1 links=0
  while [ -L "$path" ]; do
    links=$((links + 1)); [ "$links" -le 40 ] || { stat -L "$1" > /dev/null; exit 1; }
    to=$(readlink "$path" && echo .) || exit 1
    to=${to%?.}
    case $to in /*) path=$to ;; *) path=${path%/*}/$to ;; esac
  done
}
