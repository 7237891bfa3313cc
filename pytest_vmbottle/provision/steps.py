"""What is done to a guest while a pack is made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vmbottle.backend import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineDied, MachineError, VMBottleError
from pytest_vmbottle.provision.context import BUILD_SECONDS

if TYPE_CHECKING:
    from pytest_vmbottle._os import Deadline
    from pytest_vmbottle.backend import Channel
    from pytest_vmbottle.machine import Machine
    from pytest_vmbottle.spec import Layer

__all__ = ["do", "equip"]

_INSTALL = r"""
export DEBIAN_FRONTEND=noninteractive
if command -v apt-get >/dev/null; then apt-get -qq update && apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=60 -- "$@"
elif command -v dnf >/dev/null; then dnf install -y -- "$@"
elif command -v apk >/dev/null; then apk add -- "$@"
elif command -v zypper >/dev/null; then zypper --non-interactive install -- "$@"
else echo "no package manager is known in this guest" >&2; exit 1; fi
"""
# What a machine is woken and spoken to by, where an image was not made with it: Debian, Fedora, Alpine and openSUSE name it alike.
_EQUIP = rf"""
set --
command -v python3 >/dev/null || set -- python3
command -v qemu-ga >/dev/null || set -- "$@" qemu-guest-agent
[ $# -gt 0 ] || exit 0
({_INSTALL}) || exit
if command -v systemctl >/dev/null; then
  udevadm control --reload && udevadm trigger --settle --subsystem-match=virtio-ports
  systemctl start qemu-guest-agent
else rc-update add qemu-guest-agent && rc-service qemu-guest-agent start; fi
"""


def do(step: Layer, machine: Machine) -> None:
    """Does what a layer says.

    Raises:
        MachineError: It failed; with the console's last lines. Only a hypervisor that crashed is worth another try.
    """
    try:
        _apply(step, machine)
    except Exception as error:
        told = str(error) if isinstance(error, VMBottleError) else f"{type(error).__name__}: {error}"
        message = f"the layer {step.name} could not be built: {told}"
        failed = MachineError(message, machine=machine.name, console_tail=machine.console.tail(20))
        failed.lasting = not _is_crash(error)
        raise failed from error


def equip(channel: Channel, deadline: Deadline) -> str:
    """Installs what a machine is woken and best spoken to by; why that cannot be, if it cannot: without, it is done by SSH."""
    script = Command(argv=("/bin/sh", "-c", _EQUIP), env=(("PATH", GUEST_PATH), ("HOME", "/root")))
    done = channel.run(script, deadline=deadline)
    if not done.returncode:
        return ""
    return "it took too long" if done.timed_out else " ".join(done.stderr.decode(errors="replace").split()[-40:])


def _apply(step: Layer, machine: Machine) -> None:
    packages = tuple(step.keywords.get("packages", ()))
    if packages:
        machine.exec(["sh", "-c", _INSTALL, "sh", *packages], timeout=BUILD_SECONDS)
    machine.write_files(dict(step.keywords.get("files", {})))
    for script in step.keywords.get("run", ()):
        machine.exec(script, timeout=BUILD_SECONDS)
    if step.function is not None:
        step.function(machine)


def _is_crash(error: Exception) -> bool:
    """Whether it was the hypervisor that failed, which a step of a layer cannot help: all else may be the step's own doing."""
    return isinstance(error, MachineDied) and not error.lasting and error.exitcode not in (None, 0)
