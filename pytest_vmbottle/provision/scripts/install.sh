# Installs packages with the guest's own package manager.
# Arguments: the packages.
# apt-get install waits for dpkg's lock, because a guest that has just booted may be busy with updates of its own.
export DEBIAN_FRONTEND=noninteractive
if command -v apt-get >/dev/null; then apt-get -qq update && apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=60 -- "$@"
elif command -v dnf >/dev/null; then dnf install -y -- "$@"
elif command -v apk >/dev/null; then apk add -- "$@"
elif command -v zypper >/dev/null; then zypper --non-interactive install -- "$@"
else echo "no package manager is known in this guest" >&2; exit 1; fi
