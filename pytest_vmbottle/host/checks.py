"""Checks of this computer: its system, its memory and limits, and access to /dev/kvm."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from functools import partial
from pathlib import Path

import attrs

from pytest_vmbottle.host import resources
from pytest_vmbottle.host.account import user_name
from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.host.files import read_or_empty
from pytest_vmbottle.host.findings import TOOL_SECONDS, Answer, Check, Command, Remedy, degraded, install, missing, ok
from pytest_vmbottle.host.sizes import format_size

__all__ = ["checks", "kvm_remedy"]

_LITTLE_MEMORY = 1 << 30
# Linux's own limits for a process, soft and hard (INR_OPEN_CUR and INR_OPEN_MAX): somebody has set a lower one.
_FEW_FILES, _MANY_FILES = 1024, 4096


def checks(memory_budget: int | None) -> tuple[Check, ...]:
    """Return the checks for machines of every backend.

    Args:
        memory_budget: Bytes that all machines may have together, if set.
    """
    return (
        Check("system", _system, needed=True),
        Check("memory", partial(_memory, memory_budget)),
        Check("setpriv", _setpriv),
        Check("open files", _open_files),
    )


def _system() -> Answer:
    name, release, machine = platform.system(), platform.release(), platform.machine()
    if name == "Linux":
        return ok(f"Linux {release} on {machine}", release=release, machine=machine)
    return missing(f"machines need a Linux host, and this is {name or 'an unknown system'}", system=name)


def _memory(budget: int | None) -> Answer:
    # The RAM of machines is memory without a name (memfd), so the size of no tmpfs limits it.
    available, total, groups = resources.available_memory(), resources.total_memory(), resources.control_groups()
    details: dict[str, object] = {"available": available, "total": total, "control_groups": [attrs.asdict(group) for group in groups]}
    text = f"{format_size(available)} of {format_size(total)} are available for machines"
    # The total is the smallest of all limits, so it is equal to a group's only where that group has less than the host.
    if total in (group.limit for group in groups):
        text += " (the limit of this control group)"
    if budget is not None:
        text += f", and their budget is {format_size(budget)}"
        details["budget"] = budget
    if min(available, budget or available) < _LITTLE_MEMORY:
        return degraded(f"{text}: run few machines at once, with a small memory=", "", **details)
    return ok(text, **details)


def _setpriv() -> Answer:
    remedy, consequence = install(["util-linux"]), "a pytest that is killed leaves its machines running"
    found = shutil.which("setpriv")
    if found is None:
        return degraded(f"setpriv is not in the search path: {consequence}", remedy)
    # Run, not only found: BusyBox has a setpriv without this option.
    ended = run_tool([found, "--pdeathsig", "KILL", "--", "true"], timeout=TOOL_SECONDS)
    if not ended.ok:
        return degraded(f"{found} has no option --pdeathsig: {consequence}", remedy, path=found, output=ended.output[:500])
    return ok(f"{found} ends machines with the pytest that started them", path=found)


def _open_files() -> Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return ok(f"a process may have {'any number of' if soft == resource.RLIM_INFINITY else soft} files open", soft=soft, hard=hard)
    # A shell may raise its soft limit up to the hard one; beyond it only root may.
    allowed = hard == resource.RLIM_INFINITY or hard >= _MANY_FILES
    remedy = f"ulimit -n {_MANY_FILES}" if allowed else f"sudo prlimit --pid $$ --nofile={_MANY_FILES}"
    return degraded(f"a process may have only {soft} files open, too few for many machines at once", remedy, soft=soft, hard=hard)


def kvm_remedy(device: Path = Path("/dev/kvm"), registered: Path = Path("/proc/misc")) -> str:
    """Return the command that lets this user open KVM's device."""
    try:
        status, group = device.stat(), device.group()
    except FileNotFoundError:
        # The kernel knows the device but this mount namespace does not have it: a container.
        if "kvm" in read_or_empty(registered).split():
            return "docker run --device /dev/kvm ...  # the kernel has KVM, but this container has no access to it"
        vendor = "amd" if "AuthenticAMD" in read_or_empty(Path("/proc/cpuinfo")) else "intel"
        note = "if that fails, turn on virtualization in the firmware, or in the hypervisor of this host"
        return Remedy.of(Command(("sudo", "modprobe", f"kvm_{vendor}")), note=note)
    except KeyError:  # a group without a name
        status, group = device.stat(), ""
    if os.environ.get("CI"):  # where nobody logs in again, and there is nobody else
        return Remedy.of(*_udev_rule("0666"))
    join, note = Command(("sudo", "usermod", "-aG", "kvm", user_name())), "then log in again"
    if group == "kvm" and status.st_mode & 0o060 == 0o060:  # noqa: PLR2004 - the group may read and write
        return Remedy.of(join, note=note)
    return Remedy.of(*_udev_rule("0660"), join, note=note)


def _udev_rule(mode: str) -> tuple[Command, ...]:
    # With static_node udev also sets the rights of a node that is there before its module is loaded (udev(7)).
    rule = f'KERNEL=="kvm", GROUP="kvm", MODE="{mode}", OPTIONS+="static_node=kvm"\n'
    return (
        Command(("sudo", "tee", "/etc/udev/rules.d/99-kvm.rules"), reads=rule),
        Command(("sudo", "udevadm", "control", "--reload")),
        Command(("sudo", "udevadm", "trigger", "--name-match=kvm")),
    )
