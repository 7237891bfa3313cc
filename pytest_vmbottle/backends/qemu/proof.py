"""What an accelerator is worth on this host, and whether RAM can be a template: proved by running guest code.

That `/dev/kvm` opens, and even that a virtual machine can be made, says little: on a host that is itself a paravirtual guest, the firmware
runs and no operating system ever does, because every instruction of kernel mode is emulated, or refused. So the guests here do what a
kernel does, and with KVM they have to be done sooner than with emulation by QEMU itself, measured a moment before.

Both guests are small firmware images (see `firmware`) that are run instead of a BIOS and tell how far they have come through the debug
port, whose bytes QEMU writes to a file.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from pytest_vmbottle._os import Deadline, run_tool
from pytest_vmbottle.backends.qemu.command_line import KVM, SANDBOX, TCG, Accelerator
from pytest_vmbottle.backends.qemu.firmware import AMOUNTS, COUNT, RAM_BYTES, WORK, firmware
from pytest_vmbottle.backends.qemu.process import QemuProcess, connect, listen
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import BackendUnavailable, SpecError, VMBottleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Verdict", "choose", "prove_template", "run_guest", "version"]

HVF = Accelerator(name="hvf", option="hvf", cpu="host")

_ANSWER_SECONDS = 10.0
"""For a QEMU that only prints something, and for each step of the template's round trip."""

_START_SECONDS = 5.0
"""From the start of QEMU to the guest's first sign of life; it takes 0.05 s on an idle host."""

_EMULATED_SECONDS = 30.0
"""For a guest that is emulated, and so sure to come to an end; it takes 0.3 s on a fast idle host."""

_UNMEASURED_SECONDS = 2.0
"""For KVM where nothing can be compared with it; it takes less than 0.1 s on hardware."""

_TICK = 0.005


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of one accelerator.

    Attributes:
        accelerator: How the guest was run.
        works: Whether it did all of its work, rightly and in time.
        evidence: What happened, in a sentence with figures.
        seconds: What the guest took from its first sign of life; None if it did not finish.
    """

    accelerator: Accelerator
    works: bool
    evidence: str
    seconds: float | None = None


def version(binary: Path) -> str:
    """The first line of what QEMU says of itself.

    Raises:
        BackendUnavailable: The file cannot be run, or is not QEMU.
    """
    output = _answer(binary, "--version")
    if not output.startswith("QEMU emulator version "):
        raise BackendUnavailable(f"{binary} is not QEMU: asked for its version, it printed {_said(output)}", _INSTALL)
    return output.splitlines()[0]


def choose(binary: Path, wanted: str, *, workdir: Path) -> tuple[Verdict, ...]:
    """Tries accelerators, best first; the first that works is the one to use.

    Args:
        binary: QEMU, by its absolute path.
        wanted: `kvm`, `hvf` or `tcg`, or `auto` for the host's own one and then TCG.
        workdir: An existing folder for scratch files, which are removed.

    Returns:
        A verdict for each that was tried. None of them may work.

    Raises:
        BackendUnavailable: The file cannot be run, or is not QEMU.
        SpecError: There is no such accelerator.
    """
    if wanted not in ("auto", "kvm", "hvf", "tcg"):
        raise SpecError(f"{wanted!r} is not an accelerator: write auto, kvm, hvf or tcg")
    offered = _offered(binary)
    emulated = _tried(binary, TCG, offered, workdir=workdir, seconds=_EMULATED_SECONDS)
    if wanted == "tcg":
        return (emulated,)
    native = sys.platform == "darwin" and wanted == "auto"
    candidates = _HVF if native or wanted == "hvf" else _KVM
    verdicts = _hardware(binary, candidates, offered, workdir=workdir, emulated=emulated)
    return (*verdicts, emulated) if wanted == "auto" else verdicts


def run_guest(binary: Path, accelerator: Accelerator, *, workdir: Path, seconds: float) -> Verdict:
    """Runs a guest that does a known amount of what kernels do, and checks its results.

    Args:
        binary: QEMU, by its absolute path.
        accelerator: How to run it.
        workdir: An existing folder for scratch files, which are removed.
        seconds: What the guest may take from its first sign of life. Starting QEMU is not part of it.

    Raises:
        BackendUnavailable: The file cannot be run.
    """
    with _bench(binary, accelerator, WORK, workdir=workdir) as bench, bench.guest("work") as guest:
        Deadline(_START_SECONDS).poll(lambda: guest.report or guest.over, every=_TICK)
        started = time.monotonic()
        Deadline(seconds).poll(lambda: guest.over, every=_TICK)
        taken = time.monotonic() - started
        if guest.process.exitcode == _DONE and guest.report == _expected_report():
            return Verdict(accelerator=accelerator, works=True, evidence=f"ran {_amount()} in {taken:.2f} s", seconds=taken)
        return Verdict(accelerator=accelerator, works=False, evidence=_failure(guest, taken))


def prove_template(binary: Path, accelerator: Accelerator, *, workdir: Path) -> str | None:
    """Saves a guest that counts, with its RAM left in a file, and lets a clone with a private view of that file count on.

    Args:
        binary: QEMU, by its absolute path.
        accelerator: One that works.
        workdir: An existing folder for scratch files, which are removed.

    Returns:
        None if packs with RAM work on this host, else why they do not.

    Raises:
        BackendUnavailable: The file cannot be run.
    """
    with _bench(binary, accelerator, COUNT, workdir=workdir) as bench:
        try:
            counted = _save(bench)
            saved = bench.ram.read_bytes()
            _count_on(bench, counted)
        except _Unproven as error:
            return str(error)
        if bench.ram.read_bytes() != saved:
            return "a clone's writes reached the RAM file that it shares with others"
    return None


# --- accelerators ---------------------------------------------------------------------------------------------------------------------

# Some hosts list IA32_ARCH_CAPABILITIES (MSR 0x10a) and refuse to set it, whereupon QEMU aborts.
_KVM = (KVM, attrs.evolve(KVM, cpu="host,arch-capabilities=off"))
_HVF = (HVF,)

_INSTALL = "Install it: sudo apt install qemu-system-x86, sudo dnf install qemu-kvm, or brew install qemu"


def _hardware(
    binary: Path, candidates: tuple[Accelerator, ...], offered: frozenset[str], *, workdir: Path, emulated: Verdict
) -> tuple[Verdict, ...]:
    refusal = kvm_refusal(Path("/dev/kvm")) if candidates is _KVM and "kvm" in offered else None
    if refusal is not None:
        return (Verdict(accelerator=KVM, works=False, evidence=refusal),)
    verdicts: list[Verdict] = []
    for accelerator in candidates:
        verdict = _tried(binary, accelerator, offered, workdir=workdir, seconds=emulated.seconds or _UNMEASURED_SECONDS)
        if emulated.seconds is not None:
            verdict = attrs.evolve(verdict, evidence=f"{verdict.evidence}; TCG ran the whole guest in {emulated.seconds:.2f} s")
        verdicts.append(verdict)
        if verdict.works or accelerator.name not in offered:
            break
    return tuple(verdicts)


def _tried(binary: Path, accelerator: Accelerator, offered: frozenset[str], *, workdir: Path, seconds: float) -> Verdict:
    if accelerator.name not in offered:
        return Verdict(accelerator=accelerator, works=False, evidence=f"{binary} was built without it: it has {', '.join(sorted(offered))}")
    return run_guest(binary, accelerator, workdir=workdir, seconds=seconds)


def kvm_refusal(device: Path) -> str | None:
    """Why KVM's device cannot be opened, with what to do about it; None if it can."""
    try:
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

_DONE = 2 * 0x21 + 1
"""QEMU's exit status when the guest has written 0x21 to isa-debug-exit."""

# What QEMU prints when a vCPU cannot go on; the process stays, with the machine stopped.
_GAVE_UP = re.compile(r"KVM internal error|kvm run failed|entry failed")


class _Unproven(VMBottleError):
    """The round trip of a template ended early."""


@attrs.frozen(kw_only=True)
class _Guest:
    """A running guest and what it has reported."""

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
    """What the guests of one proof have in common: a command line, the image they run, a file for RAM and a scratch folder."""

    binary: Path
    accelerator: Accelerator
    folder: Path

    @property
    def ram(self) -> Path:
        return self.folder / "ram"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @contextmanager
    def guest(self, name: str, *extra: str, share: bool = False, fds: Sequence[int] = ()) -> Iterator[_Guest]:
        """Starts QEMU, and ends it with the block; `name` is for its own files."""
        report = self.folder / f"{name}.report"
        process = QemuProcess([*self._argv(report, share=share), *extra], log=self.folder / f"{name}.log", fds=fds)
        try:
            yield _Guest(process=process, report_file=report)
        finally:
            process.kill()

    @contextmanager
    def guest_with_monitor(self, name: str, *extra: str, share: bool) -> Iterator[tuple[_Guest, Qmp]]:
        """The same, with a connection to its monitor."""
        with listen(self.folder / f"{name}.qmp") as server, connect(self.folder / f"{name}.qmp") as sock:
            monitor = ("-chardev", f"socket,id=qmp,fd={server.fileno()},server=on,wait=off", "-mon", "chardev=qmp,mode=control")
            with self.guest(name, *monitor, *extra, share=share, fds=(server.fileno(),)) as guest:
                server.close()
                try:
                    with closing(Qmp(sock, deadline=Deadline(_ANSWER_SECONDS))) as qmp:
                        yield guest, qmp
                except QmpFailed as error:
                    raise _Unproven(f"{error}; QEMU printed {_said(guest.process.output)}") from error

    def _argv(self, report: Path, *, share: bool) -> list[str]:
        ram = {"qom-type": "memory-backend-file", "id": "ram0", "size": RAM_BYTES, "mem-path": str(self.ram), "share": share}
        return [
            *(str(self.binary), "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
            *("-machine", "q35,memory-backend=ram0,vmport=off,smbus=off,sata=off,usb=off,graphics=off"),
            *("-accel", self.accelerator.option, "-cpu", self.accelerator.cpu),
            *("-m", f"{RAM_BYTES // 1024}k", "-object", json.dumps(ram), "-no-reboot", "-bios", str(self.folder / "firmware")),
            *("-chardev", f"file,id=report,path={str(report).replace(',', ',,')}"),
            *("-device", "isa-debugcon,iobase=0xe9,chardev=report", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
        ]


@contextmanager
def _bench(binary: Path, accelerator: Accelerator, program: str, *, workdir: Path) -> Iterator[_Bench]:
    if not os.access(binary, os.X_OK):
        raise BackendUnavailable(f"{binary} cannot be run: it is not there, or not executable", _INSTALL)
    with tempfile.TemporaryDirectory(prefix="proof-", dir=workdir) as name:
        bench = _Bench(binary=binary, accelerator=accelerator, folder=Path(name).absolute())
        (bench.folder / "firmware").write_bytes(firmware(program))
        with bench.ram.open("wb") as ram:
            ram.truncate(RAM_BYTES)
        yield bench


# --- what a guest's end says ----------------------------------------------------------------------------------------------------------

_STAGES = {
    "R": "real mode",
    "L": "long mode with paging",
    "X": "exceptions",
    "T": "timer interrupts",
    "C": "CPUID and model-specific registers",
    "P": "page faults and changes of page tables",
    "M": "memory",
    "K": "a loop in kernel mode",
    "=": "a loop and system calls in user mode",
}
"""What a guest has done when it reports this letter, in that order."""


def _expected_report() -> bytes:
    events = sum(AMOUNTS.values()) - AMOUNTS["loops"] + AMOUNTS["faults"]  # a fault is counted by its handler and in the page it missed
    return "".join(_STAGES).encode() + struct.pack("<QQ", pow(3, 2 * AMOUNTS["loops"], 1 << 64), events)


def _amount() -> str:
    exceptions = AMOUNTS["breakpoints"] + AMOUNTS["undefined"]
    return (
        f"{2 * AMOUNTS['loops']:,} function calls in kernel and user mode, {AMOUNTS['faults']} page faults, {exceptions} exceptions, "
        f"{AMOUNTS['calls']} system calls and {AMOUNTS['ticks']} timer interrupts"
    )


def _progress(report: bytes) -> str:
    """How far a guest has come, by its report.

    >>> _progress(b"RL")
    'after it had done long mode with paging and before exceptions'
    """
    done = [letter for letter in _STAGES if letter.encode() in report.partition(b"=")[0]]
    left = [letter for letter in _STAGES if letter not in done]
    if not done:
        return "before it ran its first instruction"
    return f"after it had done {_STAGES[done[-1]]} and before {_STAGES[left[0]]}"


def _failure(guest: _Guest, taken: float) -> str:
    report, output, status = guest.report, guest.process.output, guest.process.exitcode
    where = _progress(report)
    if _GAVE_UP.search(output):
        return f"the guest could not go on {where}: {_said(output)}"
    if status == _DONE:
        return f"the guest came to its end with wrong results: {report.hex(' ')}"
    if status is not None:
        return f"QEMU {_status(status)} {where} and printed {_said(output)}"
    if guest.surprised:
        return f"the guest was interrupted by something that had no cause, {where}"
    waited = f"{taken:.2f} s after its first sign of life" if report else f"{_START_SECONDS + taken:.2f} s after QEMU was started"
    return f"the guest had not finished {waited}: it was stopped {where}"


def _status(status: int) -> str:
    """How a process ended.

    >>> _status(-6), _status(1)
    ('was ended by signal 6', 'ended with status 1')
    """
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _said(output: str) -> str:
    r"""What is worth telling of what QEMU printed: the first line that is no warning, and KVM's reason.

    >>> _said("qemu-system-x86_64: warning: old\nqemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\n")
    "'error: failed to set MSR 0x10a to 0x69'"
    """
    lines = [re.sub(r"^\S*qemu\S*: ", "", line).strip() for line in output.splitlines()]
    first = next((line for line in lines if line and not line.startswith("warning:")), "")
    reason = " (emulation failure)" if "emulation failure" in lines[1:] else ""
    return f"{first[:200]!r}{reason}" if first else "nothing"


# --- the round trip of a template -----------------------------------------------------------------------------------------------------

_LAPS = 3


def counts(start: int, end: int) -> bytes:
    """What the counting guest reports from `start` up to, and without, `end`."""
    return bytes(0x80 | number & 0x7F for number in range(start, end))


def _save(bench: _Bench) -> int:
    """Saves a guest that counts; returns the number up to which it has."""
    with bench.guest_with_monitor("saved", share=True) as (guest, qmp):
        _await_laps(guest, len(b"RL") + _LAPS, "a guest with its RAM in a shared file")
        qmp.execute("stop", deadline=Deadline(_ANSWER_SECONDS))
        _migrate(qmp, "migrate", bench.state)
        counted = len(guest.report) - len(b"RL")
        if guest.report != b"RL" + counts(1, counted + 1):
            raise _Unproven(f"a guest with its RAM in a shared file did not count right: {guest.report.hex(' ')}")
        return counted


def _count_on(bench: _Bench, counted: int) -> None:
    """Restores it with a private view of its RAM and sees that it counts on where it was."""
    with bench.guest_with_monitor("clone", "-incoming", "defer", share=False) as (guest, qmp):
        _migrate(qmp, "migrate-incoming", bench.state)
        qmp.execute("cont", deadline=Deadline(_ANSWER_SECONDS))
        _await_laps(guest, _LAPS, "a guest restored from its saved state")
        report = guest.report
    if report != counts(counted + 1, counted + 1 + len(report)):
        raise _Unproven(f"a guest that was saved after it had counted to {counted} did not count on from there: {report.hex(' ')}")


def _await_laps(guest: _Guest, size: int, what: str) -> None:
    Deadline(_ANSWER_SECONDS).poll(lambda: len(guest.report) >= size or guest.over, every=_TICK)
    if len(guest.report) >= size:
        return
    if guest.over:
        raise _Unproven(f"{what} could not go on: QEMU printed {_said(guest.process.output)}")
    raise _Unproven(f"{what} did not count on within {_ANSWER_SECONDS:g} s: it reported {guest.report.hex(' ') or 'nothing'}")


def _migrate(qmp: Qmp, verb: Literal["migrate", "migrate-incoming"], state: Path) -> None:
    with state.open("r+b" if state.exists() else "w+b") as file:
        qmp.migrate(verb, file.fileno(), deadline=Deadline(_ANSWER_SECONDS))
