# Installs packages with the guest's own package manager.
# Arguments: the packages.
# A guest that has just booted may be busy with updates of its own. apt-get install waits for dpkg's lock, but apt-get update fails where
# another one has the lists. It succeeds where only a download failed, so that a guest without a network is not asked again and again.
export DEBIAN_FRONTEND=noninteractive
update() {
  # shellcheck disable=SC2034 # it only counts
  for attempt in 1 2 3 4 5 6 7 8 9 10 11 12; do apt-get -qq update && return; sleep 5; done
  return 1
}
if command -v apt-get >/dev/null; then update && apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=60 -- "$@"
elif command -v dnf >/dev/null; then dnf install -y -- "$@"
elif command -v apk >/dev/null; then apk add -- "$@"
elif command -v zypper >/dev/null; then zypper --non-interactive install -- "$@"
else echo "no package manager is known in this guest" >&2; exit 1; fi
