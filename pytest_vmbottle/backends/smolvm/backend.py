"""smolvm as a backend: its program on this host, probed, its capabilities, and the dependencies of its packs."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import attrs

from pytest_vmbottle.backends.port import Backend, Capabilities, Instance, OwnImage, Start
from pytest_vmbottle.backends.smolvm import ending
from pytest_vmbottle.backends.smolvm.channel import SmolvmChannel
from pytest_vmbottle.backends.smolvm.checks import ProbeResult, SmolvmChecks
from pytest_vmbottle.backends.smolvm.engine import LABEL, Creation, Engine, alone
from pytest_vmbottle.backends.smolvm.instance import PACK, Maker, creation, machine_name
from pytest_vmbottle.backends.smolvm.program import Program, find_program
from pytest_vmbottle.backends.smolvm.vmm import Vmm, is_dead, me
from pytest_vmbottle.channels.port import Command
from pytest_vmbottle.errors import BackendUnavailable, MachineError, SmolvmError, SpecError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digest_cache import file_digest
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.files import private_dir, read_or_empty
from pytest_vmbottle.host.findings import Check
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["ProbeResult", "SmolvmBackend"]

_FORMAT = 2
"""Version of how machines are made and packed, part of every fingerprint."""
# Longer than smolvm itself waits for a guest's agent (30 s), so that its own reason for a failure is the one that is reported.
_PROOF_SECONDS = 38.0
_OTHERS = 300.0
_DEVICE = Path("/dev/kvm")
# As image servers and container registries name the same systems.
_SYSTEM = re.compile(r"(alpine|debian|fedora|ubuntu)-([0-9][0-9.]*)")
_NEEDS = {
    PackKind.TEMPLATE: frozenset({"branch", "checkpoint"}),
    PackKind.STREAM: frozenset({"checkpoint"}),
    PackKind.DISK: frozenset({"create"}),
}
_REASONS = {
    None: "the quickest kind that never gives two machines the same random numbers",
    PackKind.DISK: "as requested",
    PackKind.STREAM: "as requested; its machines may begin with the same random numbers",
    PackKind.TEMPLATE: "as requested; its machines may begin with the same random numbers",
}
# Two ways to ask for the Alpine that smolvm brings along: by an empty reference, and by the name of `default_source`.
_OWN = ("", "smolvm")
_SOCKET = len("/.cache/smolvm/vms/0123456789abcdef/port-forward.sock")
"""Bytes that smolvm adds to the path of its folder for a socket."""
_SOCKET_PATH = 107
"""Most bytes in the path of a socket: see unix(7)."""
_SHORT = Path("/var/tmp")  # noqa: S108 - a folder there is only used if it is ours alone


class SmolvmBackend(Backend):
    """Backend that makes machines with this host's smolvm."""

    default_source = "smolvm"

    def __init__(
        self,
        *,
        state: Path,
        proofs: Path,
        pack_kind: PackKind | None = None,
        images: Mapping[str, str] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Take the settings; nothing is looked for yet.

        Args:
            state: A folder for smolvm's machines, images and database.
            proofs: Folder for probe results.
            pack_kind: The kind of pack to make, or None for the quickest that is dependable.
            images: References by image name: a registry's reference, a path, or nothing for smolvm's own Alpine.
            warn: Function that shows a warning to the user.
        """
        self._state, self._proofs, self._pack_kind, self._warn = state, proofs, pack_kind, warn
        self._images = dict(images or {})
        self._sources: dict[str, tuple[str, Vmm]] = {}
        self._swept = False

    @cached_property
    def program(self) -> Program:
        """The smolvm program to use.

        Raises:
            BackendUnavailable: There is none.
        """
        return find_program()

    @cached_property
    def engine(self) -> Engine:
        """The commands of smolvm, with its machines."""
        return Engine(self.program, _place(self._state))

    @property
    def _kind(self) -> PackKind:
        # RAM is restored quicker than a disk is booted, but smolvm does not tell the guest: machines that follow one another then read the
        # same bytes of /dev/urandom, until its kernel has new ones (a minute at most). Seen with 1.32.2 by benchmarks/smolvm_starts.py.
        return self._pack_kind or PackKind.DISK

    def _maker(self, engine: Engine) -> Maker:
        return Maker(engine=engine, kind=self._kind, warn=self._warn, source_of=self._source_of)

    # -- what it can do here ---------------------------------------------------------------------------------------------------------

    def probe(self) -> Capabilities:
        """Return the capabilities of smolvm (see `Backend.probe`).

        They are proved by running a machine, now or earlier since this host was booted.
        """
        verdict = self.verdict
        if not verdict.works:
            raise BackendUnavailable(f"smolvm {self.program.version} runs no machine here: {verdict.evidence}", _remedy())
        if not self.program.verbs >= _NEEDS[self._kind]:
            lacks = " and ".join(sorted(_NEEDS[self._kind] - self.program.verbs))
            raise BackendUnavailable(f"smolvm {self.program.version} cannot {lacks}, as {self._kind} packs need", "Use --vm-pack=disk")
        return Capabilities(
            backend="smolvm",
            version=f"smolvm {self.program.version}",
            accelerator="kvm",
            reason=verdict.evidence,
            pack_kind=self._kind,
            pack_reason=_REASONS[self._pack_kind],
            emulated=False,
        )

    @cached_property
    def verdict(self) -> ProbeResult:
        """Probe result of smolvm, remembered until this host is booted again.

        Raises:
            BackendUnavailable: There is no smolvm.
        """
        known = self._known()
        if known is None:
            with alone(private_dir(self._proofs) / "smolvm.lock", Deadline(_OTHERS)):  # of many workers, one proves it
                # Looked up once more, because another worker may have written it down while this one waited.
                known = self._known() or self.prove_again()
        return known

    def _known(self) -> ProbeResult | None:
        try:
            return records.read_as(self._memory(), lambda facts: ProbeResult(**facts))
        except (OSError, records.Damaged):
            return None

    def prove_again(self) -> ProbeResult:
        """Run a machine now, whatever is remembered, and remember the result."""
        verdict = self._prove()
        # The first start of all unpacks disks of 30 GiB beside the program, which may take a slow host all the time there is.
        if verdict.works or verdict.seconds < _PROOF_SECONDS:
            records.write(self._memory(), attrs.asdict(verdict))
        # A cached property is an entry here: this one replaces what was found earlier.
        self.__dict__["verdict"] = verdict
        return verdict

    def checks(self, *, chosen: bool) -> tuple[Check, ...]:
        """Return the checks of smolvm (see `Backend.checks`)."""
        return SmolvmChecks(find=lambda: self.program, prove=self.prove_again, chosen=chosen).all()

    def _memory(self) -> Path:
        status = self.program.path.stat()
        # Each part of the key may turn a failure into a success: another program, another kernel, other rights to the device.
        identity = [str(self.program.path), status.st_size, status.st_mtime_ns]
        key = digest("smolvm", _FORMAT, read_or_empty(Path("/proc/sys/kernel/random/boot_id")), identity, _device())
        return private_dir(self._proofs) / f"smolvm-{key[:24]}.json"

    def _prove(self) -> ProbeResult:
        began = time.monotonic()
        refused = _no_device()
        evidence = refused or self._run_one(Deadline(_PROOF_SECONDS))
        return ProbeResult(works=not evidence, evidence=evidence or "a command ran in a guest", seconds=time.monotonic() - began)

    def _run_one(self, deadline: Deadline) -> str:
        """Run a command in a new machine; return the reason of a failure, or nothing."""
        name = f"proof-{secrets.token_hex(4)}"
        # By its label a later run removes the machine if this process is killed.
        made_of = Creation(memory=256 << 20, label=me())
        try:
            self.engine.create(name, made_of, deadline=deadline)
            vmm = Vmm(self._maker(self.engine).start_twice(name, made_of, deadline=deadline), leash=True)
            try:
                return "" if _echoes(self.engine, name, deadline) else "the guest started but answered no command"
            finally:
                vmm.kill()
                vmm.let_go()
        except MachineError as error:
            return " ".join(str(error).splitlines()[0].split())
        finally:
            self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            self.engine.delete(name, deadline=Deadline(20))
        except MachineError as error:
            self._warn(f"smolvm could not remove the machine {name}: {error}")

    def unsupported_reason(self, spec: MachineSpec) -> str | None:
        """Return what in a spec smolvm does not support (see `Backend.unsupported_reason`)."""
        cannot = {
            f"network={spec.network!r}: smolvm's machines cannot join a private LAN": bool(spec.lans),
            "display=True: smolvm's machines have no screen": spec.display,
            "capture=True: smolvm does not record network traffic": spec.capture,
            "shares=: smolvm's machines are given no folders of the host": bool(spec.shares),
            f"cpu={spec.cpu!r}: smolvm's machines have the host's processor": spec.cpu is not None,
            "cpu_clock='instructions': smolvm's machines have the host's processor, which does not count": spec.cpu_clock != "host",
            "user_data=: smolvm's machines have no cloud-init": spec.user_data is not None,
            "disks=: smolvm machines have no disks beside their own": bool(spec.disks),
            "kernel=, initrd=, cmdline= and append=: smolvm boots a kernel of its own": any(
                (spec.kernel, spec.initrd, spec.cmdline, spec.append)
            ),
            f"arch={spec.arch!r}: smolvm runs only guests of this host's architecture, {host_arch()}": spec.arch != host_arch(),
        }
        return next((why for why, applies in cannot.items() if applies), None)

    def fingerprint(self, spec: MachineSpec) -> str:
        """Return a digest of a pack's dependencies besides its spec (see `Backend.fingerprint`)."""
        return digest("smolvm", _FORMAT, self.program.version, spec.arch)

    # -- images ----------------------------------------------------------------------------------------------------------------------

    def find_image(self, source: str | Path) -> OwnImage:
        """Find the image for a spec's source: a name, a reference, an archive, a folder or a pack (see `Backend.find_image`)."""
        given = self._images.get(source, source) if isinstance(source, str) else source
        if str(given) in _OWN:
            return OwnImage(name=str(source) or "smolvm", reference="", digest=digest("smolvm's own"), quick=True)
        if isinstance(given, Path) or given.startswith(("/", "./", "../", "~/")) or given.endswith((".tar", ".smolmachine")):
            return self._local(str(source), Path(given).expanduser().absolute())
        # `debian-12` is the catalog's way to write the registry's `debian:12`.
        system = _SYSTEM.fullmatch(given)
        reference = f"{system[1]}:{system[2]}" if system else given
        return OwnImage(name=str(source), reference=reference, digest=digest("reference", reference), quick=False)

    def _local(self, name: str, path: Path) -> OwnImage:
        if path.is_dir():
            # Not of what the files hold, which every run would have to read: sizes and times stand for it.
            content = digest([_entry(each, path) for each in sorted(path.rglob("*"))])
            return OwnImage(name=name, reference=f"{path}/", digest=content, quick=False)
        if not path.is_file():
            raise SpecError(f"source={name!r}: there is no file or folder {path}")
        return OwnImage(name=name, reference=str(path), digest=file_digest(path, self._proofs), quick=path.suffix == ".smolmachine")

    def pack_image(self, reference: str, dest: Path, *, deadline: Deadline) -> None:
        """Write an image into a folder (see `Backend.find_image`)."""
        self.engine.pack(dest / PACK.removesuffix(".smolmachine"), image=reference, deadline=deadline)

    # -- machines --------------------------------------------------------------------------------------------------------------------

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        """Start a machine (see `Backend.launch`)."""
        self.probe()
        self._sweep()
        return self._maker(self.engine.of(rundir)).start(spec, source, rundir, deadline)

    def ending(self, rundir: Path) -> tuple[str, ...]:
        """Return the command that ends and removes a folder's machine (see `Backend.ending`)."""
        return ending.command(self.program.path, _place(self._state), machine_name(rundir))

    def discard(self, rundir: Path) -> None:
        """Remove smolvm's data of a folder's machine (see `Backend.discard`)."""
        self._maker(self.engine).discard(rundir)

    def close(self) -> None:
        """End the machines that others were branched from; may be called again."""
        while self._sources:
            _, (name, vmm) = self._sources.popitem()
            vmm.kill()
            vmm.let_go()
            self._remove(name)

    def _sweep(self) -> None:
        """Remove the machines of processes that are certainly gone, once."""
        if self._swept:
            return
        self._swept = True
        # Those of other runs too, since all who share the catalog share the state folder.
        for listed in self.engine.machines():
            if is_dead(listed.labels.get(LABEL, "")):
                self._remove(listed.name)

    def _source_of(self, folder: Path, spec: MachineSpec, deadline: Deadline) -> str:
        """Return the machine that clones of a pack branch from, started if this process has none yet."""
        # What a machine is branched from must be of the same shape, since a branch cannot change it.
        key = digest(str(folder), spec.cpus, spec.memory, spec.network, spec.ports)
        name, vmm = self._sources.get(key, ("", None))
        if vmm is not None and vmm.is_running:
            return name
        name = f"warm-{secrets.token_hex(6)}"
        # Its ports would be taken already: those of a branch are new ones.
        made_of = creation(spec, Start.own(saved=folder), {})
        try:
            self.engine.create(name, made_of, deadline=deadline)
            started = self._maker(self.engine).start_twice(name, made_of, branchable=True, deadline=deadline)
            # On a leash, because it belongs to no test: no folder of a machine leads the supervisor to it.
            self._sources[key] = (name, Vmm(started, leash=True))
        except BaseException:
            self._remove(name)
            raise
        return name


def _place(state: Path) -> Path:
    """Return the folder, or one of ours below /var/tmp if its socket paths are too long for the kernel or for root.

    Root's smolvm runs each machine as a user of its own, and lets all users pass through every folder above its state for that. The
    catalog stays closed to them.
    """
    if os.geteuid() != 0 and len(os.fsencode(state)) + _SOCKET <= _SOCKET_PATH:
        return state
    top = _SHORT / f"vmbottle-{os.geteuid()}"
    private_dir(top)
    # Not followed: a link may lead to a folder of ours now, and elsewhere later.
    status = top.lstat()
    # In a folder that all can write to, somebody may have made it first.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o066:
        raise BackendUnavailable(f"{top} is not private to this user, and smolvm keeps its machines there", f"Move {top} away")
    return private_dir(top / digest(str(state))[:12])


def _echoes(engine: Engine, name: str, deadline: Deadline) -> bool:
    """Tell whether a machine runs a command by the deadline."""
    channel = SmolvmChannel(engine, name, alive=lambda: None)

    def asked() -> bool:
        try:
            return channel.run(Command(argv=("echo", name)), deadline=deadline).stdout.strip() == name.encode()
        except SmolvmError:
            return False

    return bool(deadline.poll(asked, every=0.5, first=0.05))


def _device() -> list[object]:
    try:
        status = _DEVICE.stat()
    except OSError:
        return []
    return [status.st_rdev, status.st_mode, status.st_gid, os.access(_DEVICE, os.R_OK | os.W_OK)]


def _no_device() -> str:
    if not _DEVICE.exists():
        return "there is no /dev/kvm"
    return "" if os.access(_DEVICE, os.R_OK | os.W_OK) else "this user may not open /dev/kvm"


def _remedy() -> str:
    return "See vmbottle doctor, or use QEMU, which also runs without KVM: --vm-backend qemu"


def _entry(path: Path, root: Path) -> list[object]:
    status = path.lstat()
    return [str(path.relative_to(root)), status.st_mode, status.st_size, status.st_mtime_ns]
