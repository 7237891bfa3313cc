"""QEMU as a backend: which program and accelerator this host has, proved, and what a pack made by them depends on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import attrs
import cattrs
from cattrs.preconf.json import make_converter

from pytest_vmbottle import records
from pytest_vmbottle._os import Deadline, private_dir
from pytest_vmbottle.backend import Capabilities, Instance, PackKind, Start
from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.account import Account
from pytest_vmbottle.backends.qemu.command_line import FORMAT, Accelerator, Emulator, board_of
from pytest_vmbottle.backends.qemu.dialect import Dialect, ask
from pytest_vmbottle.backends.qemu.instance import Programs, start
from pytest_vmbottle.backends.qemu.processor import accelerator_for
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.spec import MachineSpec, digest, host_arch

__all__ = ["Proof", "QemuBackend", "find_program"]

_converter = make_converter()
_IMG = ("qemu-img", "qemu-utils")


def find_program(name: str, package: str) -> Path:
    """A program of QEMU's in the search path.

    Raises:
        BackendUnavailable: It is not there.
    """
    found = shutil.which(name)
    if found is None:
        raise BackendUnavailable(f"{name} is not in the search path", f"Install it: sudo apt-get install {package}")
    return Path(found).resolve()


@attrs.frozen(kw_only=True)
class Proof:
    """What was proved about this host and QEMU, and is kept until either changes.

    Attributes:
        version: QEMU's own version text.
        dialect: What it offers.
        accelerator: The one that ran guest code.
        verdicts: What came of each accelerator that was tried, in order.
        broken: The kinds of packs with RAM that do not work, and why.
    """

    version: str
    dialect: Dialect
    accelerator: Accelerator
    verdicts: tuple[proof.Verdict, ...]
    broken: Mapping[PackKind, str]

    @property
    def reason(self) -> str:
        """Why this accelerator, in one sentence."""
        refused = [verdict for verdict in self.verdicts if not verdict.works]
        if not refused:
            return self.verdicts[-1].evidence
        name = refused[-1].accelerator.name.upper()
        return f"{name} runs no guest here: {refused[-1].evidence}"

    @property
    def best(self) -> PackKind:
        """The quickest kind of pack that works."""
        return next(kind for kind in PackKind if kind not in self.broken)


class _Prover:
    """Finds out what the QEMU for one architecture can do on this host, and remembers it."""

    def __init__(self, arch: str, wanted: str, memory: Path) -> None:
        """Tries nothing yet; takes the wanted accelerator, and a folder to remember in."""
        self._board, self._wanted, self._folder = board_of(arch), wanted, memory
        self._refused: BackendUnavailable | None = None

    @cached_property
    def binary(self) -> Path:
        return find_program(f"qemu-system-{self._board.arch}", self._board.package)

    @cached_property
    def proof(self) -> Proof:
        known = _read(self._memory())
        return known if known is not None else self.prove_again()

    @property
    def emulator(self) -> Emulator:
        return Emulator(binary=self.binary, board=self._board, accelerator=self.proof.accelerator, dialect=self.proof.dialect)

    def prove_again(self) -> Proof:
        if self._refused is not None:
            raise self._refused
        try:
            known = self._prove()
        except BackendUnavailable as error:
            self._refused = error
            raise
        records.write(self._memory(), _converter.unstructure(known))
        self.proof = known
        return known

    def _memory(self) -> Path:
        key = digest(_boot_id(), _identity(self.binary), self._wanted, FORMAT, _kvm_access())
        return private_dir(self._folder) / f"qemu-{key[:24]}.json"

    def _prove(self) -> Proof:
        with tempfile.TemporaryDirectory(prefix="proving-", dir=private_dir(self._folder)) as name, _held(Path(name)) as workdir:
            version = proof.version(self.binary)
            dialect = ask(self.binary, workdir=workdir)
            verdicts = proof.choose(self.binary, dialect, self._board, self._wanted, workdir=workdir)
            accelerator = next((verdict.accelerator for verdict in verdicts if verdict.works), None)
            if accelerator is None:
                tried = "; ".join(f"{verdict.accelerator.name}: {verdict.evidence}" for verdict in verdicts)
                raise BackendUnavailable(f"QEMU runs no guest here: {tried}", "See vmbottle doctor, or allow another one: --vm-accel auto")
            emulator = Emulator(binary=self.binary, board=self._board, accelerator=accelerator, dialect=dialect)
            failures = {kind: proof.prove_restore(emulator, kind, workdir=workdir) for kind in (PackKind.TEMPLATE, PackKind.STREAM)}
            broken = {kind: failure for kind, failure in failures.items() if failure is not None}
            return Proof(version=version, dialect=dialect, accelerator=accelerator, verdicts=verdicts, broken=broken)


class QemuBackend:
    """Makes machines with the QEMU of this host."""

    def __init__(
        self, *, accelerator: str = "auto", pack_kind: PackKind | None = None, account: Account | None = None, proofs: Path
    ) -> None:
        """Chooses nothing yet.

        Args:
            accelerator: `"auto"`, or the only one that will do.
            pack_kind: The kind of pack to make, or None for the best that works.
            account: Who QEMU runs as; None for who runs us.
            proofs: A folder that remembers what was proved.
        """
        self._wanted = accelerator
        self._pack_kind = pack_kind
        self._account = account
        self._proofs = proofs
        self._provers: dict[str, _Prover] = {}

    def _prover(self, arch: str) -> _Prover:
        # No hardware runs the code of another architecture.
        wanted = self._wanted if arch == host_arch() else "tcg"
        return self._provers.setdefault(arch, _Prover(arch, wanted, self._proofs))

    @property
    def proof(self) -> Proof:
        """What this host can do for guests of its own architecture, proved now or earlier since it was booted.

        Raises:
            BackendUnavailable: No accelerator runs a guest.
        """
        return self._prover(host_arch()).proof

    def prove_again(self) -> Proof:
        """Proves it now, whatever was proved before, and remembers it; that nothing works is only remembered by this object.

        Raises:
            BackendUnavailable: No accelerator runs a guest.
        """
        return self._prover(host_arch()).prove_again()

    def programs(self, arch: str) -> Programs:
        """What makes machines of an architecture.

        Raises:
            BackendUnavailable: A program is missing, or runs no guest.
        """
        if arch != host_arch() and self._wanted not in ("auto", "tcg"):
            reason = f"guests of {arch} are emulated on this {host_arch()} host, and {self._wanted} was asked for"
            raise BackendUnavailable(reason, "Allow it: --vm-accel auto")
        emulator = self._prover(arch).emulator
        if self._account is not None:
            emulator = _run_as(self._account, emulator)
        return Programs(emulator=emulator, img=find_program(*_IMG))

    def probe(self) -> Capabilities:
        """What QEMU can do here (see `Backend.probe`)."""
        known = self.proof
        find_program(*_IMG)
        works = {
            PackKind.TEMPLATE: "a machine was restored from its RAM file and went on",
            PackKind.STREAM: "a machine was restored and went on",
        }
        why = "; ".join([*(f"no {kind} packs: {reason}" for kind, reason in known.broken.items()), works.get(known.best, "")]).strip("; ")
        forced = self._pack_kind is not None
        return Capabilities(
            backend="qemu",
            version=known.version,
            accelerator=known.accelerator.name,
            reason=known.reason,
            pack_kind=self._pack_kind or known.best,
            pack_reason="as it was asked for" if forced else why,
            emulated=known.accelerator.name == "tcg",
        )

    def _programs(self, spec: MachineSpec) -> Programs:
        """The same, with the processor that a machine is to have."""
        programs = self.programs(spec.arch)
        version = self._prover(spec.arch).proof.version
        accelerator = accelerator_for(spec, programs.emulator.accelerator, version=version)
        return attrs.evolve(programs, emulator=attrs.evolve(programs.emulator, accelerator=accelerator))

    def fingerprint(self, spec: MachineSpec) -> str:
        """What a pack depends on besides its spec (see `Backend.fingerprint`)."""
        emulator, version = self._programs(spec).emulator, self._prover(spec.arch).proof.version
        # TCG's processor is the same everywhere; under hardware virtualisation a guest sees the host's, by way of the host's kernel.
        processor = "" if emulator.accelerator.name == "tcg" else f"{_processor()} {platform.release()}"
        known = (attrs.astuple(emulator.accelerator), attrs.astuple(emulator.board))
        return digest("qemu", FORMAT, version, _content(emulator.binary, self._proofs), known, processor, spec.arch)

    def refusal(self, spec: MachineSpec) -> str | None:
        """What of a spec QEMU cannot do (see `Selective`)."""
        if isinstance(spec.network, tuple):
            return f"network={list(spec.network)}: the user network of QEMU lets a guest reach all or nothing: say True or False"
        return None

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        """Starts a machine (see `Backend.launch`)."""
        return start(self._programs(spec), spec, source=source, rundir=rundir, deadline=deadline)


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """Has a folder be locked by this process as long as it is needed: one that is not was left by a process that was killed."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(fd)


def _run_as(account: Account, emulator: Emulator) -> Emulator:
    kvm = Path("/dev/kvm")
    if emulator.accelerator.name == "kvm" and not account.may_open(kvm):
        reason = f"QEMU is to run as {account.name!r}, who may not open {kvm}"
        raise BackendUnavailable(reason, f"Make that user a member of the group of {kvm}, or allow emulation: --vm-accel tcg")
    # Who cannot open a state by its name gets its descriptor.
    return attrs.evolve(emulator, account=account, dialect=attrs.evolve(emulator.dialect, state_files=False, mapped_ram=False))


def _boot_id() -> str:
    return _text(Path("/proc/sys/kernel/random/boot_id"))


def _processor() -> str:
    lines = _text(Path("/proc/cpuinfo")).splitlines()
    keep = ("model name", "flags", "microcode", "stepping")
    return digest(sorted({line for line in lines if line.startswith(keep)}))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _kvm_access() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def _identity(path: Path) -> list[object]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]


def _content(path: Path, memory: Path) -> str:
    """The sha256 of a program, remembered by its size, times and inode."""
    known = private_dir(memory) / f"sha256-{digest(_identity(path))[:24]}"
    with suppress(OSError, ValueError, KeyError):
        return str(records.read(known)["sha256"])
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    records.write(known, {"sha256": value})
    return value


def _read(path: Path) -> Proof | None:
    try:
        return _converter.structure(records.read(path), Proof)
    except (OSError, ValueError, cattrs.BaseValidationError):
        return None  # not there, or of another version: proved again
