"""Steps done to a guest while a pack is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmbottle.channels.port import GUEST_PATH, Command
from pytest_vmbottle.errors import MachineDied, MachineError, VMBottleError
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.provision.context import BUILD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vmbottle.channels.port import Channel
    from pytest_vmbottle.host.deadline import Deadline
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.spec import Layer

__all__ = ["do", "equip"]

_INSTALL = read_script(__package__, "install.sh")
_EQUIP = read_script(__package__, "equip.sh")
_PACKAGES = "/var/tmp/vmbottle-packages"  # noqa: S108 - in the guest, for the time of the step


def do(step: Layer, machine: Machine) -> None:
    """Apply a layer to a machine.

    Raises:
        MachineError: The layer failed; the message has the console's last lines. Only a crash of the hypervisor is worth a retry.
    """
    try:
        _apply(step, machine)
    # A layer's function is a user's, so it may raise anything.
    except Exception as error:
        told = str(error) if isinstance(error, VMBottleError) else f"{type(error).__name__}: {error}"
        message = f"the layer {step.name} could not be built: {told}"
        failed = MachineError(message, machine=machine.name, console_tail=machine.console.tail(20))
        failed.lasting = not _is_crash(error)
        raise failed from error


def equip(channel: Channel, deadline: Deadline) -> str:
    """Install Python and the guest agent in the guest, if they are missing.

    Python runs our script after a restore, and without the agent SSH is used. Return why the installation failed, or an empty string.
    """
    script = Command(argv=("/bin/sh", "-c", _EQUIP), env=(("PATH", GUEST_PATH), ("HOME", "/root")))
    done = channel.run(script, deadline=deadline)
    if not done.returncode:
        return ""
    return "it took too long" if done.timed_out else " ".join(done.stderr.decode(errors="replace").split()[-40:])


def _apply(step: Layer, machine: Machine) -> None:
    # In this order, as a mark's documentation promises: scripts may use the packages and the files.
    packages = tuple(step.keywords.get("packages", ()))
    if packages:
        _install(packages, machine)
    machine.write_files(dict(step.keywords.get("files", {})))
    for script in step.keywords.get("run", ()):
        machine.exec(script, timeout=BUILD_SECONDS)
    if step.function is not None:
        step.function(machine)


def _install(packages: Sequence[str | Path], machine: Machine) -> None:
    """Install packages by name, and then those that are files of this computer."""
    names = [package for package in packages if isinstance(package, str)]
    files = [package for package in packages if isinstance(package, Path)]
    if names:
        machine.exec(["sh", "-c", _INSTALL, "sh", *names], timeout=BUILD_SECONDS)
    if files:
        folder = machine.path(_PACKAGES)
        folder.mkdir()
        for file in files:
            machine.cp(file, folder)
        # All at once, since they may need each other.
        machine.exec(["sh", "-c", _INSTALL, "sh", *(str(folder / file.name) for file in files)], timeout=BUILD_SECONDS)
        folder.rmtree()


def _is_crash(error: Exception) -> bool:
    """Tell whether the hypervisor crashed, for which a layer is not to blame.

    Any other failure may be the layer's own.
    """
    # QEMU ends with 0 when the guest powers itself off, which a layer may have done. Without a status nothing is known.
    return isinstance(error, MachineDied) and not error.lasting and error.exitcode not in (None, 0)
