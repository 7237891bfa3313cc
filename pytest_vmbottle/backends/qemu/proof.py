"""What an accelerator is worth on this host, and whether RAM can be a template: proved by running guest code.

That `/dev/kvm` opens, and even that a virtual machine can be made, says little: on a host that is itself a paravirtual guest, the firmware
runs and no operating system ever does, because every instruction of kernel mode is emulated, or refused. So the guests here do what a
kernel does, and with KVM they have to be done sooner than with emulation by QEMU itself, measured a moment before.

Both guests are small firmware images, assembled below, that are run instead of a BIOS and tell how far they have come through the debug
port, whose bytes QEMU writes to a file. The listings are sources of the GNU assembler behind their offset and their machine code.
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
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle._os import Deadline, run_tool
from pytest_vmbottle.backends.qemu.command_line import KVM, SANDBOX, TCG, Accelerator
from pytest_vmbottle.backends.qemu.process import QemuProcess, connect, listen
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed
from pytest_vmbottle.errors import BackendUnavailable, SpecError, VMBottleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

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
    with _bench(binary, accelerator, _WORK, workdir=workdir) as bench, bench.guest("work") as guest:
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
    with _bench(binary, accelerator, _COUNT, workdir=workdir) as bench:
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

_RAM = 16 << 20
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
        ram = {"qom-type": "memory-backend-file", "id": "ram0", "size": _RAM, "mem-path": str(self.ram), "share": share}
        return [
            *(str(self.binary), "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
            *("-machine", "q35,memory-backend=ram0,vmport=off,smbus=off,sata=off,usb=off,graphics=off"),
            *("-accel", self.accelerator.option, "-cpu", self.accelerator.cpu),
            *("-m", f"{_RAM // 1024}k", "-object", json.dumps(ram), "-no-reboot", "-bios", str(self.folder / "firmware")),
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
            ram.truncate(_RAM)
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

_AMOUNTS = {
    "loops": 10_000_000,
    "breakpoints": 500,
    "undefined": 20,
    "ticks": 3,
    "identifications": 20,
    "faults": 500,
    "words": 1 << 18,
    "calls": 500,
}
"""How often it does what; the guest reads them from its image. Few of what leaves the guest under KVM, where that is nested and slow."""


def _expected_report() -> bytes:
    events = sum(_AMOUNTS.values()) - _AMOUNTS["loops"] + _AMOUNTS["faults"]  # a fault is counted by its handler and in the page it missed
    return "".join(_STAGES).encode() + struct.pack("<QQ", pow(3, 2 * _AMOUNTS["loops"], 1 << 64), events)


def _amount() -> str:
    exceptions = _AMOUNTS["breakpoints"] + _AMOUNTS["undefined"]
    return (
        f"{2 * _AMOUNTS['loops']:,} function calls in kernel and user mode, {_AMOUNTS['faults']} page faults, {exceptions} exceptions, "
        f"{_AMOUNTS['calls']} system calls and {_AMOUNTS['ticks']} timer interrupts"
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


def _migrate(qmp: Qmp, command: str, state: Path) -> None:
    deadline = Deadline(_ANSWER_SECONDS)
    capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
    qmp.execute("migrate-set-capabilities", deadline=deadline, capabilities=capabilities)
    with state.open("r+b" if state.exists() else "w+b") as file:
        qmp.send_fd("state", file.fileno(), deadline=deadline)
    qmp.execute(command, deadline=deadline, uri="fd:state")
    if qmp.wait_for("MIGRATION", frozenset({"completed", "failed"}), deadline=deadline) == "failed":
        raise _Unproven(f"QEMU could not complete {command} with the RAM left in its file")


# --- the guests -----------------------------------------------------------------------------------------------------------------------

_IMAGE = 0x10000
"""Where the firmware copies itself to, and its size. Its code is at the start, its tables from 0x1000."""

_BODY = 0x100

_START = """
.equ IMAGE, 0x10000
.equ PAGE_TABLES, 0x11000
.equ GDTR, 0x17040
.equ IDTR, 0x17050
.code16
start:
000  b0 52                                movb $'R', %al                 # the first sign of life: real mode
002  e6 e9                                outb %al, $0xe9
004  fc                                   cld
005  b8 00 f0                             movw $0xf000, %ax              # the image is ROM at 0xf0000:
008  8e d8                                movw %ax, %ds
00a  b8 00 10                             movw $IMAGE>>4, %ax
00d  8e c0                                movw %ax, %es
00f  31 f6                                xorw %si, %si
011  31 ff                                xorw %di, %di
013  b9 00 20                             movw $0x2000, %cx              # 32 KiB of it are copied to RAM at 0x10000,
016  66 f3 a5                             rep movsl
019  8e d8                                movw %ax, %ds
01b  ea 20 00 00 10                       ljmp $IMAGE>>4, $ram-start     # and it runs on there
ram:
020  66 0f 01 16 40 70                    lgdtl GDTR-IMAGE
026  66 b8 a0 02 00 00                    movl $0x2a0, %eax              # PAE, PGE, OSFXSR
02c  0f 22 e0                             movl %eax, %cr4
02f  66 b8 00 10 01 00                    movl $PAGE_TABLES, %eax        # page tables
035  0f 22 d8                             movl %eax, %cr3
038  66 b9 80 00 00 c0                    movl $0xc0000080, %ecx         # EFER
03e  0f 32                                rdmsr
040  0d 01 09                             orw $0x901, %ax                # NXE, LME, SCE
043  0f 30                                wrmsr
045  66 b8 33 00 01 80                    movl $0x80010033, %eax         # PG, WP, NE, ET, MP, PE:
04b  0f 22 c0                             movl %eax, %cr0                # straight to long mode
04e  66 ea 56 00 01 00 08 00              ljmpl $0x08, $IMAGE+long-start
.code64
long:
056  b8 10 00 00 00                       movl $0x10, %eax
05b  8e d8                                movl %eax, %ds
05d  8e c0                                movl %eax, %es
05f  8e d0                                movl %eax, %ss
061  bc 00 90 00 00                       movl $0x9000, %esp
066  0f 01 1c 25 50 70 01 00              lidt IDTR
06e  b8 28 00 00 00                       movl $0x28, %eax
073  0f 00 d8                             ltr %ax
076  b0 ff                                movb $0xff, %al                # no interrupts from the old controllers
078  e6 21                                outb %al, $0x21
07a  e6 a1                                outb %al, $0xa1
07c  bd 00 00 e0 fe                       movl $0xfee00000, %ebp         # the local APIC:
081  c7 85 f0 00 00 00 ff 01 00 00        movl $0x1ff, 0xf0(%rbp)        # on
08b  c7 85 e0 03 00 00 0b 00 00 00        movl $0x0b, 0x3e0(%rbp)        # its timer: at full speed,
095  c7 85 20 03 00 00 40 00 00 00        movl $0x40, 0x320(%rbp)        # once, vector 0x40
09f  b0 4c                                movb $'L', %al                 # long mode
0a1  e6 e9                                outb %al, $0xe9
"""

_WORK = """
.equ BODY, 0x10100
.equ WINDOW, 0x400000
.equ PAGE_TABLE, 0x14000
.equ RESULTS, 0xb000
.equ LOOPS, 0x17060
.equ BREAKPOINTS, 0x17064
.equ UNDEFINED, 0x17068
.equ TICKS, 0x1706c
.equ IDENTIFICATIONS, 0x17070
.equ FAULTS, 0x17074
.equ WORDS, 0x17078
.equ CALLS, 0x1707c
.code64
work:
000  45 31 e4                             xorl %r12d, %r12d              # r12 counts what has come about
003  8b 0c 25 64 70 01 00                 movl BREAKPOINTS, %ecx
breakpoints:
00a  cc                                   int3                           # on_event
00b  ff c9                                decl %ecx
00d  75 fb                                jnz breakpoints
00f  8b 0c 25 68 70 01 00                 movl UNDEFINED, %ecx
undefined:
016  0f 0b                                ud2                            # on_undefined
018  ff c9                                decl %ecx
01a  75 fa                                jnz undefined
01c  b0 58                                movb $'X', %al                 # exceptions
01e  e6 e9                                outb %al, $0xe9
020  8b 0c 25 6c 70 01 00                 movl TICKS, %ecx
ticks:
027  c7 85 80 03 00 00 40 42 0f 00        movl $1000000, 0x380(%rbp)     # in 1 ms: on_tick
031  fb                                   sti
032  f4                                   hlt
033  fa                                   cli
034  ff c9                                decl %ecx
036  75 ef                                jnz ticks
038  b0 54                                movb $'T', %al                 # timer
03a  e6 e9                                outb %al, $0xe9
03c  44 8b 2c 25 70 70 01 00              movl IDENTIFICATIONS, %r13d
identify:
044  31 c0                                xorl %eax, %eax
046  0f a2                                cpuid
048  b9 80 00 00 c0                       movl $0xc0000080, %ecx         # EFER
04d  0f 32                                rdmsr
04f  0f 30                                wrmsr
051  49 ff c4                             incq %r12
054  41 ff cd                             decl %r13d
057  75 eb                                jnz identify
059  b0 43                                movb $'C', %al                 # CPUID and model-specific registers
05b  e6 e9                                outb %al, $0xe9
05d  8b 0c 25 74 70 01 00                 movl FAULTS, %ecx
faults:
064  48 c7 04 25 00 40 01 00 00 00 00 00  movq $0, PAGE_TABLE            # a page is taken away,
070  0f 20 d8                             movq %cr3, %rax
073  0f 22 d8                             movq %rax, %cr3
076  ff 04 25 00 00 40 00                 incl WINDOW                    # missed (on_page_fault), and given back
07d  ff c9                                decl %ecx
07f  75 e3                                jnz faults
081  8b 04 25 00 00 40 00                 movl WINDOW, %eax
088  49 01 c4                             addq %rax, %r12
08b  b0 50                                movb $'P', %al                 # paging
08d  e6 e9                                outb %al, $0xe9
08f  b8 01 00 00 00                       movl $1, %eax                  # memory: ones,
094  bf 00 00 60 00                       movl $0x600000, %edi
099  8b 0c 25 78 70 01 00                 movl WORDS, %ecx
0a0  f3 48 ab                             rep stosq
0a3  be 00 00 60 00                       movl $0x600000, %esi
0a8  8b 0c 25 78 70 01 00                 movl WORDS, %ecx
sum:
0af  48 ad                                lodsq                          # summed
0b1  49 01 c4                             addq %rax, %r12
0b4  ff c9                                decl %ecx
0b6  75 f7                                jnz sum
0b8  b0 4d                                movb $'M', %al                 # memory
0ba  e6 e9                                outb %al, $0xe9
0bc  b8 01 00 00 00                       movl $1, %eax
0c1  bb 03 00 00 00                       movl $3, %ebx
0c6  8b 0c 25 60 70 01 00                 movl LOOPS, %ecx
power:
0cd  e8 42 00 00 00                       call triple                    # rax = 3 ** loops
0d2  ff c9                                decl %ecx
0d4  75 f7                                jnz power
0d6  49 89 c6                             movq %rax, %r14
0d9  b0 4b                                movb $'K', %al                 # kernel mode
0db  e6 e9                                outb %al, $0xe9
0dd  4c 89 f0                             movq %r14, %rax
0e0  6a 1b                                pushq $0x1b                    # down to user mode: ss,
0e2  68 00 a0 00 00                       pushq $0xa000                  # rsp,
0e7  68 02 02 00 00                       pushq $0x202                   # rflags,
0ec  6a 23                                pushq $0x23                    # cs,
0ee  68 f5 01 01 00                       pushq $BODY+user-work          # rip
0f3  48 cf                                iretq
user:
0f5  8b 0c 25 60 70 01 00                 movl LOOPS, %ecx
more:
0fc  e8 13 00 00 00                       call triple                    # rax = 3 ** (2 * loops)
101  ff c9                                decl %ecx
103  75 f7                                jnz more
105  8b 0c 25 7c 70 01 00                 movl CALLS, %ecx
calls:
10c  cd 80                                int $0x80                      # on_event
10e  ff c9                                decl %ecx
110  75 fa                                jnz calls
112  cd 81                                int $0x81                      # on_end
triple:
114  48 0f af c3                          imulq %rbx, %rax
118  c3                                   ret
on_page_fault:
119  49 ff c4                             incq %r12
11c  48 c7 04 25 00 40 01 00 67 00 20 00  movq $0x200067, PAGE_TABLE
128  48 83 c4 08                          addq $8, %rsp                  # the error code
12c  48 cf                                iretq
on_undefined:
12e  48 83 04 24 02                       addq $2, (%rsp)                # past the instruction
on_event:
133  49 ff c4                             incq %r12
136  48 cf                                iretq
on_tick:
138  49 ff c4                             incq %r12
13b  c7 85 b0 00 00 00 00 00 00 00        movl $0, 0xb0(%rbp)            # end of interrupt
145  48 cf                                iretq
on_end:
147  48 89 04 25 00 b0 00 00              movq %rax, RESULTS
14f  4c 89 24 25 08 b0 00 00              movq %r12, RESULTS+8
157  b0 3d                                movb $'=', %al                 # the results, 16 bytes
159  e6 e9                                outb %al, $0xe9
15b  be 00 b0 00 00                       movl $RESULTS, %esi
160  b9 10 00 00 00                       movl $16, %ecx
165  ba e9 00 00 00                       movl $0xe9, %edx
16a  f3 6e                                rep outsb
16c  b0 21                                movb $0x21, %al                # QEMU's exit status will be 67
16e  e6 f4                                outb %al, $0xf4
on_surprise:
170  b0 21                                movb $'!', %al
172  e6 e9                                outb %al, $0xe9
174  fa                                   cli
175  f4                                   hlt
"""

_COUNT = """
.equ COUNTER, 0xc000
.code64
count:
000  bf 00 00 60 00                       movl $0x600000, %edi           # 1 MiB of words that hold their own address
fill:
005  48 89 3f                             movq %rdi, (%rdi)
008  83 c7 08                             addl $8, %edi
00b  81 ff 00 00 70 00                    cmpl $0x700000, %edi
011  72 f2                                jb fill
013  31 db                                xorl %ebx, %ebx
lap:
015  bf 00 00 60 00                       movl $0x600000, %edi
check:
01a  48 39 3f                             cmpq %rdi, (%rdi)
01d  75 40                                jne on_surprise
01f  83 c7 08                             addl $8, %edi
022  81 ff 00 00 70 00                    cmpl $0x700000, %edi
028  72 f0                                jb check
02a  48 39 1c 25 00 c0 00 00              cmpq %rbx, COUNTER             # the register and RAM must agree
032  75 2b                                jne on_surprise
034  ff c3                                incl %ebx
036  48 89 1c 25 00 c0 00 00              movq %rbx, COUNTER
03e  88 d8                                movb %bl, %al
040  0c 80                                orb $0x80, %al                 # 0x80 + count modulo 128
042  e6 e9                                outb %al, $0xe9
044  c7 85 80 03 00 00 40 42 0f 00        movl $1000000, 0x380(%rbp)     # again in 1 ms
04e  fb                                   sti
04f  f4                                   hlt
050  fa                                   cli
051  eb c2                                jmp lap
on_tick:
053  c7 85 b0 00 00 00 00 00 00 00        movl $0, 0xb0(%rbp)            # end of interrupt
05d  48 cf                                iretq
on_surprise:
05f  b0 21                                movb $'!', %al
061  e6 e9                                outb %al, $0xe9
063  fa                                   cli
064  f4                                   hlt
"""

_VECTORS = {3: "on_event", 6: "on_undefined", 14: "on_page_fault", 0x40: "on_tick", 0x80: "on_event", 0x81: "on_end"}
"""Which handler an exception or interrupt has in a program that knows it; all else is a surprise."""


def assemble(listing: str) -> tuple[bytes, dict[str, int]]:
    r"""The machine code of a listing, and where its labels are.

    >>> assemble("start:\n000  90    nop\nend:\n001  eb fd    jmp start")
    (b'\x90\xeb\xfd', {'start': 0, 'end': 1})
    """
    code, labels = b"", {}
    for line in listing.strip().splitlines():
        if re.fullmatch(r"\w+:", line):
            labels[line[:-1]] = len(code)
        elif not line.startswith("."):
            offset, machine_code, _ = re.split(r" {2,}", line, maxsplit=2)
            if int(offset, 16) != len(code):
                raise ValueError(f"the listing goes on at {len(code):#x}, not as it says: {line}")
            code += bytes.fromhex(machine_code)
    return code, labels


def firmware(listing: str) -> bytes:
    """The image of a program: the reset vector at its end, the common start, the program itself, and the tables of long mode."""
    start, body = assemble(_START)[0], assemble(listing)[0]
    parts = {
        0x0: start.ljust(_BODY, b"\x90") + body,
        0x6000: _interrupt_table(assemble(listing)[1]),
        0x7060: struct.pack("<8I", *_AMOUNTS.values()),
        0xFFF0: bytes.fromhex("ea 00 00 00 f0"),  # ljmp $0xf000, $0
        **_page_tables(),
        **_segments(),
    }
    image = bytearray(_IMAGE)
    for offset, content in parts.items():
        image[offset : offset + len(content)] = content
    return bytes(image)


def _page_tables() -> Mapping[int, bytes]:
    """Virtual addresses are physical ones, for the RAM and the local APIC, but for the page at 0x400000, which the program maps itself."""
    present, large, uncached = 0x67, 0x80, 0x10  # present: and dirty, accessed, user, writable
    directory = [megabytes << 20 | present | large for megabytes in range(0, _RAM >> 20, 2)]
    directory[2] = _IMAGE + 0x4000 | present
    return {
        0x1000: struct.pack("<Q", _IMAGE + 0x2000 | present),
        0x2000: struct.pack("<QQQQ", _IMAGE + 0x3000 | present, 0, 0, _IMAGE + 0x5000 | present),
        0x3000: struct.pack(f"<{len(directory)}Q", *directory),
        0x5FB8: struct.pack("<Q", 0xFEE00000 | present | large | uncached),
    }


def _segments() -> Mapping[int, bytes]:
    tss = _IMAGE + 0x7100
    descriptors = (
        0,
        0x00AF9B000000FFFF,  # 0x08: kernel code
        0x00CF93000000FFFF,  # 0x10: kernel data
        0x00CFF3000000FFFF,  # 0x18: user data
        0x00AFFB000000FFFF,  # 0x20: user code
        0x0000890000000067 | (tss & 0xFFFFFF) << 16,  # 0x28: task state, in two parts
        0,
    )
    return {
        0x7000: struct.pack("<7Q", *descriptors),
        0x7040: struct.pack("<HI", 8 * len(descriptors) - 1, _IMAGE + 0x7000),
        0x7050: struct.pack("<HQ", 0xFFF, _IMAGE + 0x6000),
        0x7104: struct.pack("<Q", 0x9000),  # the stack for what interrupts user mode
    }


def _interrupt_table(labels: Mapping[str, int]) -> bytes:
    handlers = (labels.get(_VECTORS.get(vector, ""), labels["on_surprise"]) for vector in range(256))
    # Gates to kernel code that user mode may call.
    return b"".join(struct.pack("<HHHHQ", _IMAGE + _BODY + handler & 0xFFFF, 0x08, 0xEE00, _IMAGE >> 16, 0) for handler in handlers)
