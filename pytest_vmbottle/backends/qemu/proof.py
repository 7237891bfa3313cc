"""Probe of accelerators and of RAM restores on this host, by running guest code.

An open `/dev/kvm`, or even a virtual machine that can be created, proves little: on a host that is itself a paravirtual guest, firmware
runs but no operating system does, because every instruction of kernel mode is emulated, or refused. So the guests here do a kernel's work,
and with KVM they have to finish sooner than with QEMU's own emulation, measured a moment before.

Both guests are small firmware images (see `firmware`) that are run instead of a BIOS. They report their progress through a port whose bytes
QEMU writes to a file.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from pytest_vmbottle.backends.qemu.command_line import HVF, KVM, Accelerator, Board, Emulator, sandbox
from pytest_vmbottle.backends.qemu.firmware import RAM_BYTES, RESULTS, WORK_DONE, Guests, aarch64, x86_64
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import BackendUnavailable, SpecError, VMBottleError
from pytest_vmbottle.host.commands import run_tool
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.spec.pack_kind import PackKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_vmbottle.backends.qemu.features import Features

__all__ = ["ProbeResult", "choose", "prove_restore", "run_guest", "version"]

_ANSWER_SECONDS = 10.0
"""Seconds for a QEMU that only prints something, and for each step of the template's round trip."""

_START_SECONDS = 5.0
"""Seconds from the start of QEMU to the guest's first sign of life; it takes 0.05 s on an idle host."""

_EMULATED_SECONDS = 30.0
"""Seconds for an emulated guest, which is sure to finish; it takes 0.3 s on a fast idle host."""

_SLACK = 3.0
"""Factor of that time: a busy host may give one guest a third of what it gave the other. KVM that is emulated is many times slower."""
_UNMEASURED_SECONDS = 2.0
"""Seconds for KVM if nothing can be compared with it; it takes less than 0.1 s on hardware."""

# A fast guest is over in less than 0.1 s, and what is measured is compared.
_TICK = 0.005


@attrs.frozen(kw_only=True)
class ProbeResult:
    """Probe result of one accelerator.

    Attributes:
        accelerator: The accelerator that ran the guest.
        works: Whether the guest finished its work, correctly and in time.
        evidence: A sentence with figures about what happened.
        seconds: Seconds from the guest's first sign of life to its end; None if it did not finish.
    """

    accelerator: Accelerator
    works: bool
    evidence: str
    seconds: float | None = None


def version(binary: Path) -> str:
    """Return the first line of QEMU's version output.

    Raises:
        BackendUnavailable: The file cannot be run, or is not QEMU.
    """
    output = _answer(binary, "--version")
    if not output.startswith("QEMU emulator version "):
        raise BackendUnavailable(f"{binary} is not QEMU: asked for its version, it printed {_said(output)}", _INSTALL)
    return output.splitlines()[0]


def choose(binary: Path, dialect: Features, board: Board, wanted: str, *, workdir: Path) -> tuple[ProbeResult, ...]:
    """Probe accelerators, best first, until one works.

    Args:
        binary: QEMU's absolute path.
        dialect: Its features.
        board: The board that the guests run on.
        wanted: `kvm`, `hvf` or `tcg`, or `auto` for the host's own accelerator and then TCG.
        workdir: An existing folder for scratch files, which are removed.

    Returns:
        A verdict for each one that was tried. Maybe none of them works.

    Raises:
        BackendUnavailable: The file cannot be run, or is not QEMU.
        SpecError: There is no such accelerator.
    """
    if wanted not in ("auto", "kvm", "hvf", "tcg"):
        raise SpecError(f"{wanted!r} is not an accelerator: write auto, kvm, hvf or tcg")
    offered = _offered(binary)
    emulator = Emulator(binary=binary, board=board, accelerator=board.tcg, dialect=dialect)
    # First, because its time sets the limit for hardware: a KVM that is slower than emulation is emulated itself.
    emulated = _tried(emulator, offered, workdir=workdir, seconds=_EMULATED_SECONDS)
    if wanted == "tcg":
        return (emulated,)
    native = sys.platform == "darwin" and wanted == "auto"
    candidates = _HVF if native or wanted == "hvf" else _kvm(board)
    verdicts = _hardware(emulator, candidates, offered, workdir=workdir, emulated=emulated)
    return (*verdicts, emulated) if wanted == "auto" else verdicts


def run_guest(emulator: Emulator, *, workdir: Path, seconds: float) -> ProbeResult:
    """Run a guest that does a known amount of a kernel's work, and check its results.

    Args:
        emulator: The QEMU and the accelerator to run it with.
        workdir: An existing folder for scratch files, which are removed.
        seconds: Seconds for the guest from its first sign of life, without the start of QEMU.

    Raises:
        BackendUnavailable: The file cannot be run.
    """
    guests = _GUESTS[emulator.board.arch]()
    with _bench(emulator, guests, guests.work, workdir=workdir) as bench, bench.guest("work", ram=bench.ram, share=False) as guest:
        # QEMU's own start does not count: a busy host may take seconds to load it.
        Deadline(_START_SECONDS).poll(lambda: guest.report or guest.over, every=_TICK)
        started = time.monotonic()
        # Polled, because a guest that got stuck in KVM leaves a QEMU that neither ends nor says anything more.
        Deadline(seconds).poll(lambda: guest.over, every=_TICK)
        taken = time.monotonic() - started
        if guest.process.exitcode == guests.done and guest.report == "".join(guests.stages).encode() + RESULTS:
            evidence = f"ran {WORK_DONE} in {taken:.2f} s"
            return ProbeResult(accelerator=emulator.accelerator, works=True, evidence=evidence, seconds=taken)
        return ProbeResult(accelerator=emulator.accelerator, works=False, evidence=_failure(guests, guest, taken))


def prove_restore(emulator: Emulator, kind: PackKind, *, workdir: Path) -> str | None:
    """Save a guest that counts, as a pack of this kind, and let a clone count on.

    Args:
        emulator: A QEMU whose accelerator works.
        kind: The kind of pack: its RAM is in a file that the clone maps privately, or in the saved state.
        workdir: An existing folder for scratch files, which are removed.

    Returns:
        None if packs of this kind work on this host, else the reason.

    Raises:
        BackendUnavailable: The file cannot be run.
    """
    guests = _GUESTS[emulator.board.arch]()
    with _bench(emulator, guests, guests.count, workdir=workdir) as bench:
        try:
            counted = _save(bench, kind)
            saved = bench.ram.read_bytes()
            _count_on(bench, kind, counted)
        except _Unproven as error:
            return str(error)
        # Clones must not see each other's writes, so their view of the file has to be private.
        if bench.ram.read_bytes() != saved:
            return "a clone's writes reached the RAM file that it shares with others"
    return None


# --- accelerators ---------------------------------------------------------------------------------------------------------------------

_GUESTS = {"x86_64": x86_64.guests, "aarch64": aarch64.guests}

# Some hosts list IA32_ARCH_CAPABILITIES (MSR 0x10a) and refuse to set it, whereupon QEMU aborts.
_WITHOUT = attrs.evolve(KVM, cpu="host,arch-capabilities=off")
_HVF = (HVF,)

_INSTALL = (
    "Install it: sudo apt install qemu-system-x86 (for aarch64 guests qemu-system-arm), sudo dnf install qemu-kvm, or brew install qemu"
)


def _kvm(board: Board) -> tuple[Accelerator, ...]:
    return (KVM, _WITHOUT) if board.arch == "x86_64" else (KVM,)


def _hardware(
    emulator: Emulator, candidates: tuple[Accelerator, ...], offered: frozenset[str], *, workdir: Path, emulated: ProbeResult
) -> tuple[ProbeResult, ...]:
    refusal = kvm_refusal(Path("/dev/kvm")) if candidates[0] == KVM and "kvm" in offered else None
    if refusal is not None:
        return (ProbeResult(accelerator=KVM, works=False, evidence=refusal),)
    verdicts: list[ProbeResult] = []
    for accelerator in candidates:
        tried = attrs.evolve(emulator, accelerator=accelerator)
        # KVM has to be faster than emulation: if it is not, its instructions are emulated too.
        verdict = _tried(tried, offered, workdir=workdir, seconds=_SLACK * (emulated.seconds or _UNMEASURED_SECONDS))
        if emulated.seconds is not None:
            verdict = attrs.evolve(verdict, evidence=f"{verdict.evidence}; TCG ran the whole guest in {emulated.seconds:.2f} s")
        verdicts.append(verdict)
        # The other candidates differ only in the processor's features, which is no help if the accelerator is missing.
        if verdict.works or accelerator.name not in offered:
            break
    return tuple(verdicts)


def _tried(emulator: Emulator, offered: frozenset[str], *, workdir: Path, seconds: float) -> ProbeResult:
    if emulator.accelerator.name not in offered:
        evidence = f"{emulator.binary} was built without {emulator.accelerator.name}: it has {', '.join(sorted(offered))}"
        return ProbeResult(accelerator=emulator.accelerator, works=False, evidence=evidence)
    return run_guest(emulator, workdir=workdir, seconds=seconds)


def kvm_refusal(device: Path) -> str | None:
    """Return why KVM's device cannot be opened, and what to do; None if it can."""
    try:
        # Opened, not only looked at: mode bits say nothing about ACLs, control groups of devices or containers.
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}; {_kvm_remedy(error)}"
    return None


def _kvm_remedy(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "run `sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`; if that fails, turn on virtualization in firmware or hypervisor"
    if isinstance(error, PermissionError):
        return (
            "run `sudo usermod -aG kvm $USER` and log in again, or on a CI host add the udev rule "
            """`echo 'KERNEL=="kvm", MODE="0666", OPTIONS+="static_node=kvm"' | sudo tee /etc/udev/rules.d/99-kvm.rules`, then run """
            "`sudo udevadm control --reload` and `sudo udevadm trigger --name-match=kvm`"
        )
    return "see `dmesg | grep -i kvm`"


def _answer(binary: Path, *arguments: str) -> str:
    try:
        ended = run_tool([binary, *arguments], timeout=_ANSWER_SECONDS)
    except OSError as error:
        raise BackendUnavailable(f"{binary} cannot be run: {error.strerror}", _INSTALL) from error
    if not ended.ok:
        how = f"did not end within {_ANSWER_SECONDS:g} s" if ended.returncode is None else _status(ended.returncode)
        raise BackendUnavailable(f"`{' '.join(ended.argv)}` {how} and printed {_said(ended.output)}", _INSTALL)
    return ended.output


def _offered(binary: Path) -> frozenset[str]:
    head, _, names = _answer(binary, "-accel", "help").partition("\n")
    if not head.startswith("Accelerators supported"):
        raise BackendUnavailable(f"{binary} is not QEMU: asked for its accelerators, it printed {_said(head)}", _INSTALL)
    return frozenset(names.split())


# --- machines -------------------------------------------------------------------------------------------------------------------------

# What QEMU prints when a vCPU cannot go on; the process stays, with the machine stopped.
_GAVE_UP = re.compile(r"KVM internal error|kvm run failed|entry failed")


class _Unproven(VMBottleError):
    """The round trip of a template failed."""


@attrs.frozen(kw_only=True)
class _Guest:
    """A running guest and its report."""

    process: QemuProcess
    report_file: Path

    @property
    def report(self) -> bytes:
        return self.report_file.read_bytes() if self.report_file.exists() else b""

    @property
    def surprised(self) -> bool:
        return b"!" in self.report.partition(b"=")[0]  # the results may hold any byte

    @property
    def over(self) -> bool:
        return self.process.exitcode is not None or self.surprised or _GAVE_UP.search(self.process.output) is not None


@attrs.frozen(kw_only=True)
class _Bench:
    """Common parts of the guests of one probe: command line, image, RAM file and scratch folder."""

    emulator: Emulator
    guests: Guests
    folder: Path

    @property
    def ram(self) -> Path:
        return self.folder / "ram"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @contextmanager
    def guest(self, name: str, *extra: str, ram: Path, share: bool, fds: Sequence[int] = ()) -> Iterator[_Guest]:
        """Start QEMU for a block; `name` is for its files."""
        report = self.folder / f"{name}.report"
        process = QemuProcess([*self._argv(report, ram, share=share), *extra], log=self.folder / f"{name}.log", fds=fds)
        try:
            yield _Guest(process=process, report_file=report)
        finally:
            process.kill()

    @contextmanager
    def guest_with_monitor(self, name: str, *extra: str, ram: Path, share: bool) -> Iterator[tuple[_Guest, Qmp]]:
        """Start QEMU as `guest` does, and connect to its monitor."""
        ours, its = socket.socketpair()
        with ours, its:
            monitor = ("-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control")
            with self.guest(name, *monitor, *extra, ram=ram, share=share, fds=(its.fileno(),)) as guest:
                its.close()
                try:
                    with closing(Qmp(ours, deadline=Deadline(_ANSWER_SECONDS))) as qmp:
                        yield guest, qmp
                except QmpFailed as error:
                    raise _Unproven(f"{error}; QEMU printed {_said(guest.process.output)}") from error

    def migrate(self, qmp: Qmp, verb: Literal["migrate", "migrate-incoming"], kind: PackKind) -> None:
        """Write or read a guest's state."""
        dialect = self.emulator.dialect
        self.state.touch()
        deadline = Deadline(_ANSWER_SECONDS)
        qmp.migrate(verb, self.state, capabilities=dialect.capabilities(kind), by_name=dialect.state_files, deadline=deadline)

    def _argv(self, report: Path, ram: Path, *, share: bool) -> list[str]:
        board, accelerator, dialect = self.emulator.board, self.emulator.accelerator, self.emulator.dialect
        backend = {"qom-type": "memory-backend-file", "id": "ram0", "size": RAM_BYTES, "mem-path": str(ram), "share": share}
        return [
            *(str(self.emulator.binary), "-nodefaults", "-no-user-config", "-display", "none", *sandbox(dialect)),
            *("-machine", f"{board.machine},memory-backend=ram0", "-accel", accelerator.option, "-cpu", accelerator.cpu),
            # A triple fault resets a PC: with -no-reboot QEMU ends, and does not run the guest again and again.
            *("-m", f"{RAM_BYTES // 1024}k", "-object", json.dumps(backend), "-no-reboot", "-bios", str(self.folder / "firmware")),
            # A comma in an option's value is written twice, or it would end the value.
            *("-chardev", f"file,id=report,path={str(report).replace(',', ',,')}", *self.guests.devices),
        ]


@contextmanager
def _bench(emulator: Emulator, guests: Guests, image: bytes, *, workdir: Path) -> Iterator[_Bench]:
    if not os.access(emulator.binary, os.X_OK):
        raise BackendUnavailable(f"{emulator.binary} cannot be run: it is not there, or not executable", _INSTALL)
    with tempfile.TemporaryDirectory(prefix="proof-", dir=workdir) as name:
        bench = _Bench(emulator=emulator, guests=guests, folder=Path(name).absolute())
        (bench.folder / "firmware").write_bytes(image)
        _blank(bench.ram)
        yield bench


def _blank(path: Path) -> Path:
    with path.open("wb") as ram:
        ram.truncate(RAM_BYTES)
    return path


# --- what a guest's end says ----------------------------------------------------------------------------------------------------------


def _progress(stages: Mapping[str, str], report: bytes) -> str:
    """Describe a guest's progress, from its report.

    >>> _progress({"R": "real mode", "L": "long mode"}, b"R")
    'after it had done real mode and before long mode'
    """
    done = [letter for letter in stages if letter.encode() in report.partition(b"=")[0]]
    left = [letter for letter in stages if letter not in done]
    if not done:
        return "before it ran its first instruction"
    return f"after it had done {stages[done[-1]]} and before {stages[left[0]]}"


def _failure(guests: Guests, guest: _Guest, taken: float) -> str:
    report, output, status = guest.report, guest.process.output, guest.process.exitcode
    where = _progress(guests.stages, report)
    if _GAVE_UP.search(output):
        return f"the guest could not continue {where}: {_said(output)}"
    if status == guests.done and b"=" in report:
        return f"the guest ended with wrong results: {report.hex(' ')}"
    if status is not None:
        return f"QEMU {_status(status)} {where} and printed {_said(output)}"
    if guest.surprised:
        return f"the guest got an unexpected interrupt or exception {where}"
    waited = f"{taken:.2f} s after its first output" if report else f"{_START_SECONDS + taken:.2f} s after QEMU was started"
    return f"the guest had not finished {waited}: it was stopped {where}"


def _status(status: int) -> str:
    """Describe the end of a process.

    >>> _status(-6), _status(1)
    ('was ended by signal 6', 'ended with status 1')
    """
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _said(output: str) -> str:
    r"""Extract the important part of QEMU's output: the first line that is no warning, and KVM's reason.

    >>> _said("qemu-system-x86_64: warning: old\nqemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\n")
    "'error: failed to set MSR 0x10a to 0x69'"
    """
    lines = [re.sub(r"^\S*qemu\S*: ", "", line).strip() for line in output.splitlines()]
    first = next((line for line in lines if line and not line.startswith("warning:")), "")
    reason = " (emulation failure)" if "emulation failure" in lines[1:] else ""
    return f"{first[:200]!r}{reason}" if first else "nothing"


# --- the round trip of a pack  -----------------------------------------------------------------------------------------------------

_LAPS = 3


def counts(start: int, end: int) -> bytes:
    """Return the counting guest's report from `start` up to, and without, `end`."""
    # The highest bit is set, so no number is taken for a letter of `hello` or for the `!` of a surprise.
    return bytes(0x80 | number & 0x7F for number in range(start, end))


def _save(bench: _Bench, kind: PackKind) -> int:
    """Save a guest that counts; return its last number."""
    hello = bench.guests.hello
    with bench.guest_with_monitor("saved", ram=bench.ram, share=True) as (guest, qmp):
        _await_laps(guest, len(hello) + _LAPS, "a guest with its RAM in a shared file")
        # Stopped first: with RAM left out of the state, a guest that runs would write to it while the state is written.
        qmp.execute("stop", deadline=Deadline(_ANSWER_SECONDS))
        bench.migrate(qmp, "migrate", kind)
        counted = len(guest.report) - len(hello)
        if guest.report != hello + counts(1, counted + 1):
            raise _Unproven(f"a guest with its RAM in a shared file counted wrong: {guest.report.hex(' ')}")
        return counted


def _count_on(bench: _Bench, kind: PackKind, counted: int) -> None:
    """Restore the guest and check that it counts on from its last number.

    Its RAM is mapped privately, or comes with its state.
    """
    template = kind is PackKind.TEMPLATE
    ram = bench.ram if template else _blank(bench.folder / "ram-of-clone")
    with bench.guest_with_monitor("clone", "-incoming", "defer", ram=ram, share=not template) as (guest, qmp):
        bench.migrate(qmp, "migrate-incoming", kind)
        qmp.execute("cont", deadline=Deadline(_ANSWER_SECONDS))
        _await_laps(guest, _LAPS, "a guest restored from its saved state")
        report = guest.report
    if report != counts(counted + 1, counted + 1 + len(report)):
        raise _Unproven(f"a guest that was saved at {counted} did not continue to count from there after the restore: {report.hex(' ')}")


def _await_laps(guest: _Guest, size: int, what: str) -> None:
    Deadline(_ANSWER_SECONDS).poll(lambda: len(guest.report) >= size or guest.over, every=_TICK)
    if len(guest.report) >= size:
        return
    if guest.over:
        raise _Unproven(f"{what} could not continue: QEMU printed {_said(guest.process.output)}")
    raise _Unproven(f"{what} did not continue to count within {_ANSWER_SECONDS:g} s: it reported {guest.report.hex(' ') or 'nothing'}")
