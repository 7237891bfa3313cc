# Starts the runner, whose program is the input. Argument: 1 if the processor is emulated.
# An emulator translates a program anew that lies at another address than the last time, which takes several times as long as to run it. So
# the guest booted without addresses drawn at random (command_line.py). From now on they are, unless the user said otherwise in the same way;
# but not for commands and what those start.
fixed=
if [ "$1" = 1 ]; then
  [ "$(grep -ow norandmaps /proc/cmdline | wc -l)" != 1 ] || echo 2 >/proc/sys/kernel/randomize_va_space
  ! setarch "$(uname -m)" -R true || fixed="setarch $(uname -m) -R"
fi 2>/dev/null
# shellcheck disable=SC2086 # several words, or none
exec $fixed python3 -
