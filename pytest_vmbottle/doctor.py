"""What this host can do for machines: each answer found by trying, with the command that mends what is missing."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle import host
from pytest_vmbottle._os import format_size, private_dir, run_tool
from pytest_vmbottle.backends.qemu import Account, QemuBackend, proof
from pytest_vmbottle.backends.qemu.backend import Proof
from pytest_vmbottle.backends.qemu.command_line import BOARDS, Board, Emulator, Wiring, board_of, command_line
from pytest_vmbottle.backends.qemu.dialect import Dialect
from pytest_vmbottle.backends.smolvm import SmolvmBackend
from pytest_vmbottle.catalog import Catalog, default_reason, default_root
from pytest_vmbottle.errors import BackendUnavailable, CatalogError
from pytest_vmbottle.images import RECIPES
from pytest_vmbottle.images.apt import apt_sources
from pytest_vmbottle.images.builder import without_ids
from pytest_vmbottle.spec import MachineSpec, host_arch

__all__ = ["Finding", "State", "can_run", "examine"]

_NEEDED = frozenset({"system", "qemu", "qemu-img", "accelerator", "catalog", "disk space"})
_LITTLE_SPACE, _NO_SPACE = 10 << 30, 3 << 30
_LITTLE_MEMORY = 1 << 30
_NOBODY = 65534
"""Whom whatever needs no rights runs as (UIDS-GIDS in systemd's documentation)."""
_FEW_FILES, _MANY_FILES = 1024, 4096
_TOOL_SECONDS = 10.0


class State(StrEnum):
    """How it stands: `DEGRADED` works, but slower or only in part; `UNKNOWN` could not be found out."""

    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"
    UNKNOWN = "unknown"


@attrs.frozen(kw_only=True)
class Finding:
    """One answer.

    Attributes:
        topic: What it is about: a short name that stays the same.
        state: How it stands.
        text: A sentence, with the evidence.
        remedy: The command that mends it; empty where nothing is to be mended, or no command can.
        details: The facts behind it, fit for JSON.
    """

    topic: str
    state: State
    text: str
    remedy: str = ""
    details: Mapping[str, Any] = attrs.field(factory=dict)


def can_run(findings: Iterable[Finding]) -> bool:
    """Whether machines can be run: nothing that they need is missing, or could not be found out."""
    return not any(finding.topic in _NEEDED and finding.state in (State.MISSING, State.UNKNOWN) for finding in findings)


def examine(catalog_root: Path, *, accel: str = "auto") -> tuple[Finding, ...]:
    """Looks at everything that machines, packs and images need on this host; raises nothing.

    Args:
        catalog_root: The catalog's folder, which is made if it is not there; what was proved is remembered in it.
        accel: `auto`, or the only accelerator that will do.
    """
    with _proofs(catalog_root) as proofs:
        qemu = _Qemu(QemuBackend(accelerator=accel, proofs=proofs), accel)
        smolvm = _Smolvm(SmolvmBackend(state=proofs / "smolvm", proofs=proofs))
        probes: dict[str, Callable[[], _Answer]] = {
            "system": _system,
            "qemu": _qemu,
            "qemu-img": _qemu_img,
            "accelerator": qemu.accelerator,
            "packs": qemu.packs,
            "smolvm": smolvm.program,
            "smolvm machines": smolvm.machines,
            "catalog": lambda: _catalog(catalog_root),
            "disk space": lambda: _disk_space(catalog_root),
            "memory": _memory,
            "setpriv": _setpriv,
            "rights": _rights,
            "open files": _open_files,
            "mmdebstrap": _image_tools,
            "user namespaces": _namespaces,
            "archive keys": _archive_keys,
        }
        return tuple(_finding(topic, probe) for topic, probe in probes.items())


@contextmanager
def _proofs(catalog_root: Path) -> Iterator[Path]:
    """The folder that remembers what was proved, or one for now if the catalog cannot be used."""
    try:
        folder = private_dir(Catalog(catalog_root).proofs)
    except (CatalogError, OSError):
        with tempfile.TemporaryDirectory(prefix="vmbottle-doctor-") as name:
            yield Path(name)
    else:
        yield folder


@attrs.frozen
class _Answer:
    """A finding that has no topic yet."""

    state: State
    text: str
    details: Mapping[str, Any]
    remedy: str = ""


def _ok(text: str, **details: object) -> _Answer:
    return _Answer(State.OK, text, details)


def _degraded(text: str, remedy: str = "", **details: object) -> _Answer:
    return _Answer(State.DEGRADED, text, details, remedy)


def _missing(text: str, remedy: str = "", **details: object) -> _Answer:
    return _Answer(State.MISSING, text, details, remedy)


def _unknown(text: str, **details: object) -> _Answer:
    return _Answer(State.UNKNOWN, text, details)


def _finding(topic: str, probe: Callable[[], _Answer]) -> Finding:
    try:
        answer = probe()
    except Exception as error:  # that a question found no answer is an answer, and the others are still to be asked
        answer = _unknown(f"this could not be found out: {type(error).__name__}: {error}")
    return Finding(topic=topic, state=answer.state, text=answer.text, remedy=answer.remedy, details=answer.details)


def _system() -> _Answer:
    name, release, machine = platform.system(), platform.release(), platform.machine()
    if name == "Linux":
        return _ok(f"Linux {release} on {machine}", release=release, machine=machine)
    return _missing(f"machines are run on Linux, whose kernel ends and feeds them, and this is {name or 'unknown'}", system=name)


# -- QEMU ------------------------------------------------------------------------------------------------------------------------------


def _install_qemu() -> str:
    return f"sudo apt-get install {board_of(host_arch()).package} qemu-utils"


def _devices(board: Board) -> list[str]:
    """What every machine's command line asks of QEMU, whatever else it may use where it is there."""
    least = Dialect(sandbox=False, exit_with_parent=False, readonly_ram=False, state_files=False, mapped_ram=False, vmgenid=False)
    emulator = Emulator(binary=Path(), board=board, accelerator=board.tcg, dialect=least)
    files = dict.fromkeys(("ram", "overlay", "seed", "console"), Path())
    lines = dict.fromkeys(("qmp", "agent", "waker"), 0)
    boot = {"disks": (), "kernel": None, "initrd": None, "cmdline": "", "share": True, "incoming": False}
    argv = command_line(emulator, MachineSpec(source="any", arch=board.arch), Wiring(name="any", **files, **lines, **boot))  # type: ignore[arg-type]
    return sorted({value.partition(",")[0] for option, value in pairwise(argv) if option == "-device"})


def _qemu() -> _Answer:
    try:
        board = board_of(host_arch())
    except BackendUnavailable as error:
        return _missing(error.reason, error.remedy)
    name = f"qemu-system-{board.arch}"
    others = sorted({path.name for folder in os.get_exec_path() for path in Path(folder).glob("qemu-system-*")} - {name})
    found = shutil.which(name)
    if found is None:
        there = f"; {', '.join(others)} cannot run machines of this host's kind" if others else ""
        return _missing(f"{name} is not in the search path{there}", _install_qemu(), others=others)
    try:
        version = proof.version(Path(found))
    except BackendUnavailable as error:
        return _missing(error.reason, _install_qemu(), path=found, others=others)
    accelerators, devices, networks = (_offered(found, what) for what in ("accel", "device", "netdev"))
    has = {name: f'"{name}"' in devices for name in _devices(board)} | {"user network": "user" in networks}
    lacking = [name for name, there in has.items() if not there]
    details = {"path": found, "version": version, "accelerators": sorted(accelerators), "has": has, "others": others}
    if lacking:
        return _missing(f"{found} was built without what every machine has: {', '.join(lacking)}", _install_qemu(), **details)
    return _ok(f"{version}, {found}", **details)


def _offered(qemu: str, what: str) -> set[str]:
    """The words with which QEMU answers what it has of something, without its headings."""
    # Without a machine, since only x86 has one by default.
    ended = run_tool([qemu, f"-{what}", "help", "-machine", "none"], timeout=_TOOL_SECONDS)
    return {word.strip(",") for line in ended.output.splitlines() if not line.endswith(":") for word in line.split()}


def _qemu_img() -> _Answer:
    found = shutil.which("qemu-img")
    if found is None:
        return _missing("qemu-img is not in the search path", "sudo apt-get install qemu-utils")
    ended = run_tool([found, "--version"], timeout=_TOOL_SECONDS)
    version = (ended.output.splitlines() or [""])[0]
    if not ended.ok or not version.startswith("qemu-img version "):
        text = f"{found} does not work: asked for its version, it printed {version!r}"
        return _missing(text, "sudo apt-get install --reinstall qemu-utils", path=found)
    return _ok(f"{version}, {found}", path=found, version=version)


class _Qemu:
    """What the proof comes to; its outcome, good or bad, is what two questions are about."""

    def __init__(self, backend: QemuBackend, wanted: str) -> None:
        self._backend, self._wanted = backend, wanted
        self._failure: BackendUnavailable | None = None

    def accelerator(self) -> _Answer:
        try:
            proved = self._backend.prove_again()
        except BackendUnavailable as error:
            self._failure = error
            return _missing(error.reason, self._remedy() if host_arch() in BOARDS else error.remedy, wanted=self._wanted)
        chosen = proved.accelerator.name
        details = {"name": chosen, "wanted": self._wanted, "verdicts": [attrs.asdict(verdict) for verdict in proved.verdicts]}
        if chosen == "tcg" != self._wanted:
            text, remedy = _why_emulated(proved, Path("/dev/kvm"))
            return _degraded(text, remedy, **details)
        evidence = next(verdict.evidence for verdict in proved.verdicts if verdict.works)
        return _ok(f"using {chosen.upper()}{' as asked for' if self._wanted == chosen else ''}: a guest {evidence}", **details)

    def _remedy(self) -> str:
        if not shutil.which(f"qemu-system-{host_arch()}") or not shutil.which("qemu-img") or self._wanted == "auto":
            return _install_qemu()
        if self._wanted == "kvm" and proof.kvm_refusal(Path("/dev/kvm")):
            return _kvm_remedy(Path("/dev/kvm"))
        return "vmbottle doctor --accel auto"

    def packs(self) -> _Answer:
        if self._failure is not None:
            return _unknown("which kind of pack works cannot be proved while no guest runs")
        able = self._backend.probe()
        details = {"kind": str(able.pack_kind), "reason": able.pack_reason}
        if able.pack_kind == "template":
            return _ok(f"template packs, with disk and RAM: {able.pack_reason}", **details)
        if able.pack_kind == "stream":
            return _degraded(f"stream packs, whose RAM each machine reads, because they cannot share it: {able.pack_reason}", **details)
        return _degraded(f"disk packs, from which machines boot, because RAM cannot be restored: {able.pack_reason}", **details)


class _Smolvm:
    """The other backend, which nobody has to have."""

    def __init__(self, backend: SmolvmBackend) -> None:
        self._backend = backend

    def program(self) -> _Answer:
        try:
            found = self._backend.program
        except BackendUnavailable as error:
            return _ok(f"not used: {error.reason}", remedy=error.remedy)
        return _ok(f"smolvm {found.version}, {found.path}", path=str(found.path), version=found.version, verbs=sorted(found.verbs))

    def machines(self) -> _Answer:
        try:
            verdict = self._backend.prove_again()
        except BackendUnavailable:
            return _ok("not tried, because there is no smolvm")
        details = {"evidence": verdict.evidence, "seconds": round(verdict.seconds, 1)}
        if verdict.works:
            return _ok(f"smolvm runs machines: {verdict.evidence}, after {verdict.seconds:.1f} s", **details)
        return _missing(f"smolvm runs no machine here: {verdict.evidence}", _kvm_remedy_for(verdict.evidence), **details)


def _kvm_remedy_for(evidence: str) -> str:
    return _kvm_remedy(Path("/dev/kvm")) if "/dev/kvm" in evidence else ""


def _why_emulated(proved: Proof, device: Path) -> tuple[str, str]:
    """Why hardware does not help, and what to do about it."""
    tried = [verdict for verdict in proved.verdicts if not verdict.works]
    name = tried[0].accelerator.name.upper()
    if any("was built without" in verdict.evidence for verdict in tried):
        return f"this QEMU was built without {name}: using TCG, which is many times slower", _install_qemu()
    refusal = proof.kvm_refusal(device) if name == "KVM" else None
    if refusal is not None:
        return f"{refusal.partition(';')[0]}: using TCG, which is many times slower", _kvm_remedy(device)
    # No command on this host mends that: whatever it runs on would have to offer nested virtualization, and a good one.
    evidence = "; ".join(f"with -cpu {verdict.accelerator.cpu}: {verdict.evidence}" for verdict in tried)
    return f"{name} present, runs no guest: using TCG, which is many times slower ({evidence})", ""


def _kvm_remedy(device: Path, registered: Path = Path("/proc/misc")) -> str:
    try:
        status, group = device.stat(), device.group()
    except FileNotFoundError:
        if "kvm" in _text(registered).split():
            return "docker run --device /dev/kvm ...  # the kernel has it, and this container was not given it"
        vendor = "amd" if "AuthenticAMD" in _text(Path("/proc/cpuinfo")) else "intel"
        return f"sudo modprobe kvm_{vendor}  # if that fails, turn on virtualization in the firmware, or in what this host runs on"
    except KeyError:  # a group without a name
        status, group = device.stat(), ""
    join = "sudo usermod -aG kvm $USER  # then log in again"
    if os.environ.get("CI"):  # where nobody logs in again, and there is nobody else
        return _udev_rule("0666")
    if group == "kvm" and status.st_mode & 0o060 == 0o060:  # noqa: PLR2004 - the group may read and write
        return join
    return f"{_udev_rule('0660')} && {join}"


def _udev_rule(mode: str) -> str:
    rule = f"""echo 'KERNEL=="kvm", GROUP="kvm", MODE="{mode}", OPTIONS+="static_node=kvm"' | sudo tee /etc/udev/rules.d/99-kvm.rules"""
    return f"{rule} && sudo udevadm control --reload && sudo udevadm trigger --name-match=kvm"


# -- the catalog, space and limits -----------------------------------------------------------------------------------------------------


def _catalog(root: Path) -> _Answer:
    kind = host.file_system(root)
    details = {"path": str(root), "file_system": kind, "network": host.is_network_file_system(root)}
    try:
        catalog = Catalog(root)
    except CatalogError as error:
        return _missing(str(error), "export VMBOTTLE_CATALOG=/var/tmp/vmbottle-$USER", **details)
    if catalog.root == default_root() and default_reason():
        text = f"{default_reason()}, so {catalog.root} is used: what is made in a container's own files is gone with it"
        return _degraded(text, "export VMBOTTLE_CATALOG=DIR  # one that is kept", **details)
    return _ok(f"{catalog.root} can be used, on {kind or 'a file system that cannot be told'}", **details)


def _disk_space(root: Path) -> _Answer:
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(place)
    details = {"path": str(place), "free": usage.free, "total": usage.total}
    text = f"{format_size(usage.free)} of {format_size(usage.total)} are free for images and packs in {place}"
    if usage.free < _NO_SPACE:
        return _missing(
            f"{text}, less than the {format_size(_NO_SPACE)} that an image and its packs need", "vmbottle pack prune", **details
        )
    if usage.free < _LITTLE_SPACE:
        return _degraded(f"{text}, little if many packs are to be kept", "vmbottle pack prune --older-than 7d", **details)
    return _ok(text, **details)


def _memory() -> _Answer:
    # The RAM of machines is memory without a name (memfd), so the size of no tmpfs limits it.
    available, total, groups = host.available_memory(), host.total_memory(), host.control_groups()
    details = {"available": available, "total": total, "control_groups": [attrs.asdict(group) for group in groups]}
    text = f"{format_size(available)} of {format_size(total)} are available for machines"
    if total in (group.limit for group in groups):
        text += ", which is the limit of this control group"
    if available < _LITTLE_MEMORY:
        return _degraded(f"{text}: run few at once, with a small memory=", "", **details)
    return _ok(text, **details)


def _setpriv() -> _Answer:
    remedy, consequence = "sudo apt-get install util-linux", "a pytest that is killed leaves its machines running"
    found = shutil.which("setpriv")
    if found is None:
        return _degraded(f"setpriv is not in the search path: {consequence}", remedy)
    ended = run_tool([found, "--pdeathsig", "KILL", "--", "true"], timeout=_TOOL_SECONDS)
    if not ended.ok:
        return _degraded(f"{found} does not know --pdeathsig: {consequence}", remedy, path=found, output=ended.output[:500])
    return _ok(f"{found} ends machines with the pytest that started them", path=found)


def _rights() -> _Answer:
    """Whose rights a guest would have that broke out of QEMU."""
    if os.geteuid() != 0:
        return _ok("QEMU runs as this user, who is not root", root=False)
    chosen = os.environ.get("VMBOTTLE_RUN_AS", "")
    remedy = "useradd --system vmbottle && export VMBOTTLE_RUN_AS=vmbottle  # or in pytest's ini file: vm_run_as = vmbottle"
    if not chosen:
        return _degraded("QEMU runs as root, whose rights a guest would have that broke out of it", remedy, root=True)
    account = Account.parse(chosen)
    if account.uid == _NOBODY:
        text = "QEMU runs as nobody, as other programs do, whose processes could reach into it"
        return _degraded(text, remedy, root=False, run_as=chosen)
    return _ok(f"QEMU runs as {account.name}, who is not root", root=False, run_as=chosen)


def _open_files() -> _Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FEW_FILES:
        return _ok(f"a process may have {'any number of' if soft == resource.RLIM_INFINITY else soft} files open", soft=soft, hard=hard)
    allowed = hard == resource.RLIM_INFINITY or hard >= _MANY_FILES
    remedy = f"ulimit -n {_MANY_FILES}" if allowed else f"sudo prlimit --pid $$ --nofile={_MANY_FILES}"
    return _degraded(f"a process may have only {soft} files open, too few for many machines at once", remedy, soft=soft, hard=hard)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# -- building images -------------------------------------------------------------------------------------------------------------------

_CANNOT_BUILD = "images cannot be built here, only added"


def _tool(name: str) -> str | None:
    # Administrators' tools are not on the path of ordinary users.
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin")


def _image_tools() -> _Answer:
    packages = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "tar": "tar"} | ({"unshare": "util-linux"} if os.geteuid() == 0 else {})
    paths = {name: _tool(name) for name in packages}
    lacking = [name for name, path in paths.items() if path is None]
    if lacking:
        remedy = f"sudo apt-get install {' '.join(sorted({packages[name] for name in lacking}))}"
        return _degraded(f"there is no {' and no '.join(lacking)}: {_CANNOT_BUILD}", remedy, paths=paths)
    ended = run_tool([str(paths["mmdebstrap"]), "--version"], timeout=_TOOL_SECONDS)
    said = ended.output.strip()[:200]
    if not ended.ok:
        remedy = "sudo apt-get install --reinstall mmdebstrap"
        return _degraded(f"{paths['mmdebstrap']} does not work, it printed {said!r}: {_CANNOT_BUILD}", remedy, paths=paths)
    return _ok(f"{said} and {paths['mke2fs']} build images", paths=paths, version=said)


def _namespaces() -> _Answer:
    """Whether an ordinary user can build images, which takes a user namespace with other ids in it: see subuid(5)."""
    if os.geteuid() == 0:
        return _ok("root builds images without them", needed=False)
    newuidmap, mmdebstrap = _tool("newuidmap"), _tool("mmdebstrap")
    if newuidmap is None:
        return _degraded(f"there is no newuidmap: without root, {_CANNOT_BUILD}", "sudo apt-get install uidmap", needed=True)
    remedy = without_ids()
    if remedy:
        return _degraded(f"this user has no subordinate user and group ids: without root, {_CANNOT_BUILD}", remedy, needed=True)
    if mmdebstrap is None:
        return _unknown("whether this user gets one is tried with mmdebstrap, which is missing", needed=True)
    ended = run_tool([mmdebstrap, "--unshare-helper", "true"], timeout=_TOOL_SECONDS)
    if not ended.ok:
        said = ended.output.strip()[-200:]
        return _degraded(
            f"this user gets none, which was said with {said!r}: without root, {_CANNOT_BUILD}", _allow_namespaces(), needed=True
        )
    return _ok("this user gets one, and builds images in it", needed=True)


def _allow_namespaces() -> str:
    switches = {"kernel.unprivileged_userns_clone": "1", "kernel.apparmor_restrict_unprivileged_userns": "0"}
    wrong = [f"{name}={right}" for name, right in switches.items() if _text(Path("/proc/sys", *name.split("."))).strip() not in ("", right)]
    return f"sudo sysctl -w {' '.join(wrong)}" if wrong else ""


def _archive_keys() -> _Answer:
    """Packages come from this host's own sources, or else from the recipe's archive, for which its keys must be here."""
    details = {name: {"keyring": str(recipe.keyring[0]), "there": recipe.keyring[0].exists()} for name, recipe in RECIPES.items()}
    lacking = {name: recipe for name, recipe in RECIPES.items() if not details[name]["there"] and not apt_sources(recipe.suite)}
    if lacking:
        remedy = f"sudo apt-get install {' '.join(sorted({recipe.keyring[1] for recipe in lacking.values()}))}"
        return _degraded(
            f"the keys that the packages of {' and '.join(lacking)} are signed with are missing: {_CANNOT_BUILD}", remedy, **details
        )
    return _ok(f"the packages of {' and '.join(RECIPES)} can be checked", **details)
