# Defines `fail PATH [REASON]`: what fails says which path it was about on its standard output.
set -u # an empty folder's name would be the root's
fail() { printf '%s\0' "$1"; [ $# -eq 1 ] || echo "$1: $2" >&2; exit 1; }
