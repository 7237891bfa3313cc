"""Checks of QEMU: its programs, accelerator, packs and privileges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import attrs

from pytest_vmbottle.backends.port import Capabilities, DataDisk
from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.command_line import BOARDS, Board, DiskSlot, Emulator, LaunchResources, board_of, command_line
from pytest_vmbottle.backends.qemu.features import Features
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.checks import kvm_remedy
from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.host.findings import TOOL_SECONDS, Answer, Check, degraded, install, missing, ok, unknown
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["QemuChecks"]

_DEVICE = Path("/dev/kvm")
_NOBODY = 65534
"""The user of programs that need no rights (UIDS-GIDS in systemd's documentation)."""


@attrs.define(kw_only=True)
class QemuChecks:
    """Checks of one QEMU; two of them report the outcome of its probe.

    Attributes:
        wanted: The accelerator that was asked for, or `auto`.
        account: The account that QEMU runs as; None for our own.
        prove: Function that tries all accelerators now, or raises `BackendUnavailable` where none runs a guest.
        emulator: Function that returns the emulator, or raises the same if `account` may not use it.
        probe: Function that returns the capabilities.
        broken: Function that returns the kinds of packs that do not work here, with reasons.
        chosen: Whether machines are run with QEMU.
    """

    wanted: str
    account: Account | None
    prove: Callable[[], Sequence[proof.ProbeResult]]
    emulator: Callable[[], object]
    probe: Callable[[], Capabilities]
    broken: Callable[[], Mapping[PackKind, str]]
    chosen: bool
    _failure: BackendUnavailable | None = attrs.field(default=None, init=False)

    def all(self) -> tuple[Check, ...]:
        """Return the checks in the order to run them."""
        return (
            Check("qemu", _qemu, needed=self.chosen),
            Check("qemu-img", _qemu_img, needed=self.chosen),
            Check("accelerator", self._accelerator, needed=self.chosen),
            Check("packs", self._packs),
            Check("rights", self._rights),
        )

    def _accelerator(self) -> Answer:
        try:
            verdicts = self.prove()
        except BackendUnavailable as error:
            # The failure is kept, because two other checks have no answer without a working accelerator.
            self._failure = error
            return missing(error.reason, self._remedy() if host_arch() in BOARDS else error.remedy, wanted=self.wanted)
        works = next(verdict for verdict in verdicts if verdict.works)
        chosen = works.accelerator.name
        details = {"name": chosen, "wanted": self.wanted, "verdicts": [attrs.asdict(verdict) for verdict in verdicts]}
        try:
            self.emulator()
        except BackendUnavailable as error:
            return missing(error.reason, f"export VMBOTTLE_ACCEL=tcg  # or make that user a member of the group of {_DEVICE}", **details)
        # Emulation that somebody asked for is no finding.
        if chosen == "tcg" != self.wanted:
            text, remedy = _why_emulated(verdicts)
            return degraded(text, remedy, **details)
        return ok(f"using {chosen.upper()}{' as requested' if self.wanted == chosen else ''}: a guest {works.evidence}", **details)

    def _remedy(self) -> str:
        # With auto, TCG was tried too: where even that runs nothing, only another QEMU helps.
        if not shutil.which(f"qemu-system-{host_arch()}") or not shutil.which("qemu-img") or self.wanted == "auto":
            return _install_qemu()
        if self.wanted == "kvm" and proof.kvm_refusal(_DEVICE):
            return kvm_remedy(_DEVICE)
        return "vmbottle doctor --accel auto"

    def _packs(self) -> Answer:
        if self._failure is not None:
            return unknown("not checked: the kinds of packs can be tried only when an accelerator runs a guest")
        able = self.probe()
        details = {"kind": str(able.pack_kind), "reason": able.pack_reason}
        broken = self.broken().get(able.pack_kind)
        if broken is not None:
            text = f"{able.pack_kind} packs, {able.pack_reason}, do not work here: {broken}"
            return degraded(text, "export VMBOTTLE_PACK=auto", **details)
        if able.pack_kind == "template":
            return ok(f"template packs, with disk and RAM: {able.pack_reason}", **details)
        if able.pack_kind == "stream":
            return degraded(f"stream packs: each machine reads the RAM, because it cannot be shared here: {able.pack_reason}", **details)
        return degraded(f"disk packs: machines boot, because RAM cannot be restored here: {able.pack_reason}", **details)

    def _rights(self) -> Answer:
        """Check as whom QEMU runs: a guest that escapes has those rights."""
        if os.geteuid() != 0:
            return ok("QEMU runs as this user, who is not root", root=False)
        remedy = "useradd --system vmbottle && export VMBOTTLE_RUN_AS=vmbottle  # or in pytest's ini file: vm_run_as = vmbottle"
        if self.account is None:
            return degraded("QEMU runs as root: a guest escape would run as root", remedy, root=True)
        if self.account.uid == _NOBODY:
            text = "QEMU runs as nobody: other programs that run as nobody could access its processes"
            return degraded(text, remedy, root=False, run_as=self.account.name)
        return ok(f"QEMU runs as {self.account.name}, who is not root", root=False, run_as=self.account.name)


def _install_qemu() -> str:
    return install([board_of(host_arch()).package, "qemu-utils"])


def _devices(board: Board) -> list[str]:
    """Return the devices that every machine's command line asks of QEMU."""
    # Read off a real command line, so that the two never differ. Nothing is opened: the files and descriptors in it only fill their places.
    least = Features(sandbox=False, exit_with_parent=False, readonly_ram=False, state_files=False, mapped_ram=False, vmgenid=False)
    emulator = Emulator(binary=Path(), board=board, accelerator=board.tcg, dialect=least)
    root = DiskSlot(disk=DataDisk(name="root", size=0), port="", file=Path())
    resources = LaunchResources(
        name="any",
        ram=Path(),
        share=True,
        disks=(root,),
        seed=Path(),
        kernel=None,
        initrd=None,
        cmdline="",
        qmp=0,
        agent=0,
        waker=0,
        runner=0,
        console=0,
        incoming=False,
    )
    argv = command_line(emulator, MachineSpec(source="any", arch=board.arch), resources)
    return sorted({value.partition(",")[0] for option, value in pairwise(argv) if option == "-device"})


def _qemu() -> Answer:
    try:
        board = board_of(host_arch())
    except BackendUnavailable as error:
        return missing(error.reason, error.remedy)
    name = f"qemu-system-{board.arch}"
    others = sorted({path.name for folder in os.get_exec_path() for path in Path(folder).glob("qemu-system-*")} - {name})
    found = shutil.which(name)
    if found is None:
        there = f"; {', '.join(others)} cannot run machines of this host's architecture" if others else ""
        return missing(f"{name} is not in the search path{there}", _install_qemu(), others=others)
    try:
        version = proof.version(Path(found))
    except BackendUnavailable as error:
        return missing(error.reason, _install_qemu(), path=found, others=others)
    accelerators, devices, networks = (_offered(found, what) for what in ("accel", "device", "netdev"))
    has = {name: f'"{name}"' in devices for name in _devices(board)} | {"user network": "user" in networks}
    lacking = [name for name, there in has.items() if not there]
    details = {"path": found, "version": version, "accelerators": sorted(accelerators), "has": has, "others": others}
    if lacking:
        return missing(f"{found} lacks what every machine needs: {', '.join(lacking)}", _install_qemu(), **details)
    return ok(f"{version}, {found}", **details)


def _offered(qemu: str, what: str) -> set[str]:
    """Return the words in QEMU's answer to `help`, without its headings."""
    # Without a machine, since only x86 has one by default.
    ended = run_tool([qemu, f"-{what}", "help", "-machine", "none"], timeout=TOOL_SECONDS)
    return {word.strip(",") for line in ended.output.splitlines() if not line.endswith(":") for word in line.split()}


def _qemu_img() -> Answer:
    found = shutil.which("qemu-img")
    if found is None:
        return missing("qemu-img is not in the search path", install(["qemu-utils"]))
    ended = run_tool([found, "--version"], timeout=TOOL_SECONDS)
    version = (ended.output.splitlines() or [""])[0]
    if not ended.ok or not version.startswith("qemu-img version "):
        text = f"{found} does not work: asked for its version, it printed {version!r}"
        return missing(text, install(["qemu-utils"], "--reinstall"), path=found)
    return ok(f"{version}, {found}", path=found, version=version)


def _why_emulated(verdicts: Sequence[proof.ProbeResult]) -> tuple[str, str]:
    """Return the reason that hardware virtualisation does not work, and the remedy."""
    tried = [verdict for verdict in verdicts if not verdict.works]
    name = tried[0].accelerator.name.upper()
    if any("was built without" in verdict.evidence for verdict in tried):
        return f"this QEMU was built without {name}: using TCG, which is many times slower", _install_qemu()
    refusal = proof.kvm_refusal(_DEVICE) if name == "KVM" else None
    if refusal is not None:
        return f"{refusal.partition(';')[0]}: using TCG, which is many times slower", kvm_remedy(_DEVICE)
    # No command on this host mends that: whatever it runs on would have to offer nested virtualization, and a good one.
    evidence = "; ".join(f"with -cpu {verdict.accelerator.cpu}: {verdict.evidence}" for verdict in tried)
    return f"{name} is present but runs no guest: using TCG, which is many times slower ({evidence})", ""
