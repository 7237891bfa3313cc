# Installs packages with the guest's own package manager.
# Arguments: the packages, either all by name or all as absolute paths of files.
# A guest that has just booted may be busy with updates of its own. apt-get install waits for dpkg's lock, but apt-get update fails where
# another one has the lists. It succeeds where only a download failed, so that a guest without a network is not asked again and again.
export DEBIAN_FRONTEND=noninteractive
update() {
  # shellcheck disable=SC2034 # it only counts
  for attempt in 1 2 3 4 5 6 7 8 9 10 11 12; do apt-get -qq update && return; sleep 5; done
  return 1
}
apt() { apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=60 -- "$@"; }
# A file that its user has given needs no signature.
case $1 in /*) files=1 ;; *) files= ;; esac
# Files may need nothing else, and so no network.
if command -v apt-get >/dev/null; then { [ -n "$files" ] && apt "$@"; } || { update && apt "$@"; }
elif command -v dnf >/dev/null; then dnf install -y -- "$@"
elif command -v apk >/dev/null; then apk add ${files:+--allow-untrusted} -- "$@"
elif command -v zypper >/dev/null; then zypper --non-interactive install ${files:+--allow-unsigned-rpm} -- "$@"
else echo "no package manager is known in this guest" >&2; exit 1; fi
