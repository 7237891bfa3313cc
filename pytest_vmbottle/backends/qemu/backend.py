"""QEMU as a backend: its program and accelerator on this host, probed, and the dependencies of its packs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import attrs
from cattrs.preconf.json import make_converter

from pytest_vmbottle.backends.port import Backend, Capabilities, Instance, Start
from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.checks import QemuChecks
from pytest_vmbottle.backends.qemu.command_line import FORMAT, Accelerator, Emulator, board_of
from pytest_vmbottle.backends.qemu.features import Features, probe_features
from pytest_vmbottle.backends.qemu.launch import start
from pytest_vmbottle.backends.qemu.processor import accelerator_for, host_processor
from pytest_vmbottle.backends.qemu.shares import LACKED, find_server
from pytest_vmbottle.channels.runner import RUNNER
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host import records
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digest_cache import file_digest
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.files import private_dir, read_or_empty
from pytest_vmbottle.host.findings import Check
from pytest_vmbottle.host.locks import locked
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["Proof", "QemuBackend", "find_program"]

_converter = make_converter()


def find_program(name: str, package: str) -> Path:
    """Find a QEMU program in the search path.

    Raises:
        BackendUnavailable: It is not there.
    """
    found = shutil.which(name)
    if found is None:
        raise BackendUnavailable(f"{name} is not in the search path", f"Install it: sudo apt-get install {package}")
    # Resolved, because a firmware is looked for beside the program itself, and a link says nothing about where that is.
    return Path(found).resolve()


@attrs.frozen(kw_only=True)
class Proof:
    """Probe results for this host and QEMU, kept until either changes.

    Attributes:
        version: QEMU's own version text.
        dialect: The features that it offers.
        accelerator: The one that ran guest code.
        verdicts: The result for each accelerator that was tried, in order.
        broken: The kinds of packs with RAM that do not work, each with the reason.
    """

    version: str
    dialect: Features
    accelerator: Accelerator
    verdicts: tuple[proof.ProbeResult, ...]
    broken: Mapping[PackKind, str]

    @property
    def reason(self) -> str:
        """The reason for this accelerator, in one sentence."""
        refused = [verdict for verdict in self.verdicts if not verdict.works]
        if not refused:
            return self.verdicts[-1].evidence
        name = refused[-1].accelerator.name.upper()
        return f"{name} runs no guest here: {refused[-1].evidence}"

    @property
    def best(self) -> PackKind:
        """The quickest kind of pack that works."""
        # There is always one: kinds are defined quickest first, and DISK, the last, needs no restore of RAM and is never probed.
        return next(kind for kind in PackKind if kind not in self.broken)


class _Prover:
    """Cached probe of the QEMU for one architecture."""

    def __init__(self, arch: str, wanted: str, memory: Path) -> None:
        """Take the wanted accelerator, and a folder to remember in; nothing is tried yet."""
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
            # A failure is not written down: installing a package or joining a group mends it without a reboot.
            self._refused = error
            raise
        records.write(self._memory(), _converter.unstructure(known))
        self.proof = known
        return known

    def _memory(self) -> Path:
        # The boot id and access to /dev/kvm are part of the key, because another kernel or another group membership may change the result.
        key = digest(_boot_id(), _identity(self.binary), self._wanted, FORMAT, _kvm_access())
        return private_dir(self._folder) / f"qemu-{key[:24]}.json"

    def _prove(self) -> Proof:
        place = private_dir(self._folder)
        # One that is not locked was left by a process that was killed.
        with tempfile.TemporaryDirectory(prefix="proving-", dir=place) as name, locked(workdir := Path(name), shared=True):
            version = proof.version(self.binary)
            dialect = probe_features(self.binary, workdir=workdir)
            verdicts = proof.choose(self.binary, dialect, self._board, self._wanted, workdir=workdir)
            accelerator = next((verdict.accelerator for verdict in verdicts if verdict.works), None)
            if accelerator is None:
                tried = "; ".join(f"{verdict.accelerator.name}: {verdict.evidence}" for verdict in verdicts)
                raise BackendUnavailable(f"QEMU runs no guest here: {tried}", "See vmbottle doctor, or allow another one: --vm-accel auto")
            emulator = Emulator(binary=self.binary, board=self._board, accelerator=accelerator, dialect=dialect)
            # Tried, not read off the features: a QEMU that knows the capability may still fail to restore.
            failures = {kind: proof.prove_restore(emulator, kind, workdir=workdir) for kind in (PackKind.TEMPLATE, PackKind.STREAM)}
            broken = {kind: failure for kind, failure in failures.items() if failure is not None}
            return Proof(version=version, dialect=dialect, accelerator=accelerator, verdicts=verdicts, broken=broken)


class QemuBackend(Backend):
    """Backend that makes machines with this host's QEMU."""

    def __init__(
        self, *, accelerator: str = "auto", pack_kind: PackKind | None = None, account: Account | None = None, proofs: Path
    ) -> None:
        """Take the settings; nothing is chosen yet.

        Args:
            accelerator: `"auto"`, or the only one that will do.
            pack_kind: The kind of pack to make, or None for the best that works.
            account: The account that QEMU runs as; None for our own.
            proofs: Folder for probe results.
        """
        self._wanted = accelerator
        self._pack_kind = pack_kind
        self._account = account
        self._proofs = proofs
        self._provers: dict[str, _Prover] = {}

    def _prover(self, arch: str) -> _Prover:
        # No hardware runs the code of another architecture.
        wanted = self._wanted if arch == host_arch() else "tcg"
        # Making one costs nothing: it looks for its program and tries it only when it is asked.
        return self._provers.setdefault(arch, _Prover(arch, wanted, self._proofs))

    @property
    def proof(self) -> Proof:
        """Probe results for guests of this host's architecture, made now or earlier since boot.

        Raises:
            BackendUnavailable: No accelerator runs a guest.
        """
        return self._prover(host_arch()).proof

    def prove_again(self) -> Proof:
        """Probe again, whatever is remembered, and remember the result.

        That nothing works is remembered by this object only.

        Raises:
            BackendUnavailable: No accelerator runs a guest.
        """
        return self._prover(host_arch()).prove_again()

    def emulator(self, arch: str) -> Emulator:
        """Return the QEMU for machines of an architecture.

        Raises:
            BackendUnavailable: It is missing, or runs no guest.
        """
        if arch != host_arch() and self._wanted not in ("auto", "tcg"):
            reason = f"{self._wanted} cannot run {arch} guests on this {host_arch()} host: they need emulation"
            raise BackendUnavailable(reason, "Allow emulation: --vm-accel auto")
        emulator = self._prover(arch).emulator
        return emulator if self._account is None else _run_as(self._account, emulator)

    def probe(self) -> Capabilities:
        """Return the capabilities of QEMU on this host (see `Backend.probe`)."""
        known = self.proof
        works = {
            PackKind.TEMPLATE: "a machine was restored from its RAM file and continued",
            PackKind.STREAM: "a machine was restored and continued",
        }
        why = "; ".join([*(f"no {kind} packs: {reason}" for kind, reason in known.broken.items()), works.get(known.best, "")]).strip("; ")
        forced = self._pack_kind is not None
        return Capabilities(
            backend="qemu",
            version=known.version,
            accelerator=known.accelerator.name,
            reason=known.reason,
            pack_kind=self._pack_kind or known.best,
            pack_reason="as requested" if forced else why,
            emulated=known.accelerator.name == "tcg",
        )

    def checks(self, *, chosen: bool) -> tuple[Check, ...]:
        """Return the checks of QEMU (see `Backend.checks`)."""
        return QemuChecks(
            wanted=self._wanted,
            account=self._account,
            prove=lambda: self.prove_again().verdicts,
            emulator=lambda: self.emulator(host_arch()),
            probe=self.probe,
            broken=lambda: self.proof.broken,
            chosen=chosen,
        ).all()

    def _emulator(self, spec: MachineSpec) -> Emulator:
        """Return the QEMU, with the processor that a machine asks for."""
        emulator = self.emulator(spec.arch)
        version = self._prover(spec.arch).proof.version
        return attrs.evolve(
            emulator, accelerator=accelerator_for(spec, emulator.accelerator, emulation=emulator.board.tcg, version=version)
        )

    def fingerprint(self, spec: MachineSpec) -> str:
        """Return a digest of a pack's dependencies besides its spec (see `Backend.fingerprint`)."""
        emulator, version = self._emulator(spec), self._prover(spec.arch).proof.version
        processor = host_processor(spec, emulator.accelerator)
        known = (attrs.astuple(emulator.accelerator), attrs.astuple(emulator.board))
        # The program's content too: a distribution's update or a build of one's own may keep the version's text, and a saved state fits
        # only the program that wrote it.
        return digest("qemu", FORMAT, RUNNER, version, file_digest(emulator.binary, self._proofs), known, processor, spec.arch)

    def unsupported_reason(self, spec: MachineSpec) -> str | None:
        """Return what in a spec QEMU does not support (see `Backend.unsupported_reason`)."""
        if spec.networks:
            return f"network={list(spec.networks)}: QEMU's user network lets a guest reach everything or nothing: use True or False"
        if spec.shares and find_server() is None:
            return f"{LACKED} (package virtiofsd)"
        return None

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        """Start a machine (see `Backend.launch`)."""
        return start(self._emulator(spec), spec, source=source, rundir=rundir, deadline=deadline)


def _run_as(account: Account, emulator: Emulator) -> Emulator:
    kvm = Path("/dev/kvm")
    if emulator.accelerator.name == "kvm" and not account.may_open(kvm):
        reason = f"QEMU cannot run as {account.name!r}: this user may not open {kvm}"
        raise BackendUnavailable(reason, f"Make that user a member of the group of {kvm}, or allow emulation: --vm-accel tcg")
    # Who cannot open a state by its name gets its descriptor.
    return attrs.evolve(emulator, account=account, dialect=attrs.evolve(emulator.dialect, state_files=False, mapped_ram=False))


def _boot_id() -> str:
    return read_or_empty(Path("/proc/sys/kernel/random/boot_id"))


def _kvm_access() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def _identity(path: Path) -> list[object]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]


def _read(path: Path) -> Proof | None:
    try:
        return records.read_as(path, lambda facts: _converter.structure(facts, Proof))
    except (OSError, records.Damaged):
        return None  # not there, or of another version: proved again
