"""QEMU as a backend: which program and accelerator this host has, proved, and what a pack made by them depends on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from functools import cached_property
from pathlib import Path

import attrs
import cattrs

from pytest_vmbottle._os import Deadline, atomic_file, private_dir
from pytest_vmbottle.backend import Capabilities, Instance, PackKind, Start
from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.command_line import FORMAT, Accelerator
from pytest_vmbottle.backends.qemu.instance import Binaries, Hypervisor, start
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.spec import MachineSpec, digest, host_arch

__all__ = ["Proof", "QemuBackend", "find_binaries"]

_INSTALL = "Install it: sudo apt-get install qemu-system-x86 qemu-utils"


def find_binaries() -> Binaries:
    """The QEMU programs for this host's architecture in the search path.

    Raises:
        BackendUnavailable: One of them is missing.
    """
    found = {}
    for name in (f"qemu-system-{host_arch()}", "qemu-img"):
        path = shutil.which(name)
        if path is None:
            raise BackendUnavailable(f"{name} is not in the search path", _INSTALL)
        found[name] = Path(path).resolve()
    system, img = found.values()
    return Binaries(system=system, img=img)


@attrs.frozen(kw_only=True)
class Proof:
    """What was proved about this host and QEMU, and is kept until either changes.

    Attributes:
        version: QEMU's own version text.
        accelerator: The one that ran guest code.
        verdicts: What came of each accelerator that was tried, in order.
        template: Why RAM packs do not work, or None if they do.
    """

    version: str
    accelerator: Accelerator
    verdicts: tuple[proof.Verdict, ...]
    template: str | None

    @property
    def reason(self) -> str:
        """Why this accelerator, in one sentence."""
        refused = [verdict for verdict in self.verdicts if not verdict.works]
        if not refused:
            return self.verdicts[-1].evidence
        name = refused[-1].accelerator.name.upper()
        return f"{name} runs no guest here: {refused[-1].evidence}"


class QemuBackend:
    """Makes machines with the QEMU of this host."""

    def __init__(self, *, accelerator: str = "auto", pack_kind: PackKind | None = None, proofs: Path) -> None:
        """Chooses nothing yet.

        Args:
            accelerator: `"auto"`, or the only one that will do.
            pack_kind: The kind of pack to make, or None for the best that works.
            proofs: A folder that remembers what was proved.
        """
        self._wanted = accelerator
        self._pack_kind = pack_kind
        self._proofs = proofs
        self._refused: BackendUnavailable | None = None

    @cached_property
    def binaries(self) -> Binaries:
        """The programs."""
        return find_binaries()

    @cached_property
    def proof(self) -> Proof:
        """What this host can do, proved now or earlier since it was booted.

        Raises:
            BackendUnavailable: No accelerator runs a guest.
        """
        known = _read(self._memory())
        return known if known is not None else self.prove_again()

    def prove_again(self) -> Proof:
        """Proves it now, whatever was proved before, and remembers it; that nothing works is only remembered by this object.

        Raises:
            BackendUnavailable: No accelerator runs a guest.
        """
        if self._refused is not None:
            raise self._refused
        try:
            known = self._prove()
        except BackendUnavailable as error:
            self._refused = error
            raise
        with atomic_file(self._memory()) as file:
            file.write(json.dumps(cattrs.unstructure(known)).encode())
        return known

    def _memory(self) -> Path:
        key = digest(_boot_id(), _identity(self.binaries.system), self._wanted, FORMAT, _kvm_access())
        return private_dir(self._proofs) / f"qemu-{key[:24]}.json"

    def _prove(self) -> Proof:
        workdir = private_dir(self._proofs / f"proving-{os.getpid()}")
        try:
            version = proof.version(self.binaries.system)
            verdicts = proof.choose(self.binaries.system, self._wanted, workdir=workdir)
            accelerator = next((verdict.accelerator for verdict in verdicts if verdict.works), None)
            if accelerator is None:
                tried = "; ".join(f"{verdict.accelerator.name}: {verdict.evidence}" for verdict in verdicts)
                raise BackendUnavailable(f"QEMU runs no guest here: {tried}", "See vmbottle doctor, or allow another one: --vm-accel auto")
            template = proof.prove_template(self.binaries.system, accelerator, workdir=workdir)
            return Proof(version=version, accelerator=accelerator, verdicts=verdicts, template=template)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)

    def probe(self) -> Capabilities:
        """What QEMU can do here (see `Backend.probe`)."""
        known = self.proof
        best = PackKind.TEMPLATE if known.template is None else PackKind.DISK
        why = "a machine was restored from its RAM file and went on" if known.template is None else known.template
        forced = self._pack_kind is not None
        return Capabilities(
            backend="qemu",
            version=known.version,
            accelerator=known.accelerator.name,
            reason=known.reason,
            pack_kind=self._pack_kind or best,
            pack_reason="as it was asked for" if forced else why,
            emulated=known.accelerator.name == "tcg",
        )

    def fingerprint(self, spec: MachineSpec) -> str:
        """What a pack depends on besides its spec (see `Backend.fingerprint`)."""
        accelerator = self.proof.accelerator
        # TCG's processor is the same everywhere; under hardware virtualisation a guest sees the host's, by way of the host's kernel.
        processor = "" if accelerator.name == "tcg" else f"{_processor()} {platform.release()}"
        return digest(
            "qemu",
            FORMAT,
            self.proof.version,
            _content(self.binaries.system, self._proofs),
            attrs.astuple(accelerator),
            processor,
            spec.arch,
        )

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        """Starts a machine (see `Backend.launch`)."""
        hypervisor = Hypervisor(binaries=self.binaries, accelerator=self.proof.accelerator)
        return start(hypervisor, spec, source=source, rundir=rundir, deadline=deadline)


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
    if not known.exists():
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        with atomic_file(known) as record:
            record.write(value.encode())
    return known.read_text()


def _read(path: Path) -> Proof | None:
    try:
        return cattrs.structure(json.loads(path.read_bytes()), Proof)
    except (OSError, ValueError, cattrs.BaseValidationError):
        return None  # not there, or of another version: proved again
