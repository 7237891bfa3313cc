"""Features of a QEMU, found by asking it.

Builds differ by version, operating system and compile options.

The versions below are those that introduced a feature, as far as known. The code never compares versions, because distributions remove
features and backport them.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["Features", "probe_features"]

_ANSWER_SECONDS = 10.0


@attrs.frozen(kw_only=True)
class Features:
    """Features that a QEMU offers or lacks.

    Attributes:
        sandbox: Whether it can forbid itself system calls (`-sandbox`; on Linux, built with seccomp).
        exit_with_parent: Whether it can end with the process that started it (`-run-with exit-with-parent`, since 10.2).
        readonly_ram: Whether it can map a RAM file that it may only read, and write to its own copy of the pages (`readonly=on,rom=off`,
            since 8.2).
        state_files: Whether it can write a machine's state to a file that it opens by its name (`file:`, since 8.2; descriptors of plain
            files are deprecated since 9.1).
        mapped_ram: Whether each page of a state with RAM can have a fixed place, so that threads share the work (`mapped-ram`, since 9.0).
        vmgenid: Whether it can tell a restored guest that it is a clone (a device of x86 machines, elsewhere since 10.1).
    """

    sandbox: bool
    exit_with_parent: bool
    readonly_ram: bool
    state_files: bool
    mapped_ram: bool
    vmgenid: bool

    def capabilities(self, kind: PackKind) -> dict[str, bool]:
        """Return the migration capabilities for writing or reading a state of this kind."""
        # With x-ignore-shared, RAM stays in the file that it is. It is never combined with mapped-ram: QEMU before 11.0 crashes on that.
        mapped = self.mapped_ram and kind is PackKind.STREAM
        offered = {"mapped-ram": mapped, "multifd": mapped} if self.mapped_ram else {}
        return {"events": True, "x-ignore-shared": kind is PackKind.TEMPLATE, **offered}


def probe_features(binary: Path, *, workdir: Path) -> Features:
    """Start a QEMU without a machine and return its features.

    Args:
        binary: A QEMU system emulator, by its absolute path.
        workdir: An existing folder for its log.

    Raises:
        BackendUnavailable: QEMU does not start, or does not answer.
    """
    ours, its = socket.socketpair()
    with ours, its:
        # Without a machine it starts in a moment, and needs neither firmware nor memory.
        argv = [str(binary), *("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none")]
        argv += ["-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control"]
        process = QemuProcess(argv, log=workdir / f"asked-{os.getpid()}.log", fds=(its.fileno(),))
        its.close()
        try:
            with closing(Qmp(ours, deadline=Deadline(_ANSWER_SECONDS))) as qmp:
                return _interview(qmp)
        except QmpFailed as error:
            reason = f"{binary} did not list its features: {error}. It printed: {process.output.strip()[:500] or 'nothing'}"
            raise BackendUnavailable(reason, f"Run it by hand to see the reason: {binary} -machine none -display none") from error
        finally:
            process.kill()


def _interview(qmp: Qmp) -> Features:
    def answer(command: str, **arguments: Any) -> list[dict[str, Any]]:
        return list(qmp.execute(command, deadline=Deadline(_ANSWER_SECONDS), **arguments))

    try:
        vmgenid = bool(answer("device-list-properties", typename="vmgenid"))
    except QmpFailed:  # it knows no such device; a QEMU that is gone fails the next question too
        vmgenid = False
    options = {each["option"]: {parameter["name"] for parameter in each["parameters"]} for each in answer("query-command-line-options")}
    ram = {each["name"] for each in answer("qom-list-properties", typename="memory-backend-file")}
    transports = {"socket", "exec", "file"}  # the members of MigrationAddressType in qapi/migration.json
    # Names of schema types are mangled in an answer, so the type is recognised by its members.
    state_files = any(transports <= set(each["values"]) for each in answer("query-qmp-schema") if each["meta-type"] == "enum")
    capabilities = {each["capability"] for each in answer("query-migrate-capabilities")}
    return Features(
        sandbox="sandbox" in options,
        exit_with_parent="exit-with-parent" in options.get("run-with", ()),
        readonly_ram={"readonly", "rom"} <= ram,
        state_files=state_files,
        mapped_ram=state_files and {"mapped-ram", "multifd"} <= capabilities,
        vmgenid=vmgenid,
    )
