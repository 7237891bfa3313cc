"""Builds of base images with mmdebstrap, as root or as an ordinary user."""

from __future__ import annotations

import io
import os
import re
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import tarfile
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pytest_vmbottle.errors import BackendUnavailable, CatalogError
from pytest_vmbottle.host.account import user_name
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.findings import Command, Remedy
from pytest_vmbottle.host.locks import locked
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.images.apt import apt_sources, keyrings
from pytest_vmbottle.images.recipes import RECIPES, TAKES_SEED, Recipe
from pytest_vmbottle.images.store import (
    INITRD,
    KERNEL,
    NO_CLOUD_INIT,
    Image,
    ImageStore,
    Traits,
    abandoned,
    check_name,
    copy_in,
    explained,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["build", "can_build", "check_package", "recipe_digest", "required_tools", "without_ids"]

# The packages have done what systemd would do once more at the first boot, and the image does quickly what cloud-init would do.
_CMDLINE = (
    "root=/dev/vda rw console={console} quiet net.ifnames=0 fsck.mode=skip systemd.condition_needs_update=0 "
    f"systemd.wants={TAKES_SEED} {NO_CLOUD_INIT}"
)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*(?:[=/][A-Za-z0-9.+:~-]+)?")
_TOOLS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils", "tar": "tar"}
_ROOT_TOOLS = {"setpriv": "util-linux", "unshare": "util-linux"}
_USER_TOOLS = {"newuidmap": "uidmap"}
# What mmdebstrap mounts and starts ends with it, and it ends with us, however that comes: else a later clean-up would go through
# its mounts into the host. For an ordinary user it makes such namespaces itself.
_LEASH = ("setpriv", "--pdeathsig", "KILL")
_NAMESPACES = (*_LEASH, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_UNMOUNTING = 5.0
"""Seconds that an interrupted tool has for unmounting what it has mounted."""
_SCRIPT = "vmbottle-script"  # run_script.sh knows it too
_RUN_SCRIPT = read_script(__package__, "run_script.sh")
# The unpacked system and its raw disk lie side by side.
_NEEDED_SPACE = 2 << 30
_PREFIX = "vmbottle-build-"
_SUBORDINATE = re.compile(r"^([^:\n]+):(\d+):(\d+)$", re.MULTILINE)  # subuid(5)
# What mmdebstrap says it is doing, and what that is called here.
_STEPS = {
    "running apt-get update": "reading the package lists",
    "downloading packages": "downloading the essential packages",
    "extracting archives": "unpacking them",
    "installing essential packages": "installing them",
    "installing remaining packages": "downloading and installing the kernel and the other packages",
    "cleaning package lists": "tidying up",
}


def can_build(name: str) -> bool:
    """Tell whether there is a recipe of this name."""
    return name in RECIPES


def recipe_digest(name: str) -> str:
    """Return a digest of everything of ours that an image is built from; packages are the archive's own."""
    return digest(repr(RECIPES[name]), _CMDLINE)


def build(  # noqa: PLR0913 - a build has many parts
    store: ImageStore,
    recipe: str,
    *,
    name: str | None = None,
    include: Sequence[str] = (),
    script: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Image:
    """Build a base image, as root or as an ordinary user, and store it.

    An older image of its name is replaced.

    Args:
        recipe: One of `RECIPES`.
        name: The image's name; by default the recipe's.
        include: Packages besides the recipe's.
        script: A script that is run in the new system at the end, as root, with the host's network: by `sh -eu`, or by the program that its
            first line names after `#!`.
        progress: Function that gets a line for each step, with the seconds since the start.

    Raises:
        BackendUnavailable: This host lacks a tool, space or a right; the remedy says what to do.
        CatalogError: The recipe is unknown, or a step failed; then the message has the end of its output. Nothing was added.
    """
    if recipe not in RECIPES:
        raise CatalogError(f"there is no recipe for {recipe!r}: the recipes are {', '.join(sorted(RECIPES))}")
    chosen, name = RECIPES[recipe], name or recipe
    # The recipe's name is checked before any work, and so are the packages: a build takes minutes.
    check_name(name)
    for package in include:
        check_package(package)
    arch, console = _arch_of(chosen, recipe)
    started = time.monotonic()

    def say(step: str) -> None:
        progress(f"{time.monotonic() - started:4.0f} s  {step}")

    with explained(f"build {recipe}"), _Workshop.opened(say) as shop, store.staging() as folder:
        root = _install(shop, chosen, arch, include, script)
        say("making the disk")
        _make_disk(shop, root, folder, chosen.disk_size)
        say("adding it to the images")
        words = ", with ".join((chosen.description, *([", ".join(include)] if include else []), *(["a script"] if script else [])))
        cmdline = _CMDLINE.format(console=console)
        # The kernel beside the disk is booted directly, so the traits' firmware does not matter, not even on aarch64.
        image = store.publish(folder, name=name, cmdline=cmdline, description=words, traits=Traits(prepared=True), replace=True)
    say("done")
    return image


def check_package(name: str) -> None:
    """Refuse an invalid package name, which may have a version or release.

    Raises:
        CatalogError: The name is invalid.
    """
    if not _PACKAGE.fullmatch(name):
        raise CatalogError(f"{name!r} is not the name of a package: give names, one by one, such as 'nginx' or 'nginx=1.22.1-9'")


def required_tools(*, rootless: bool) -> dict[str, str]:
    """Return the programs that a build takes, and the packages that they are in."""
    return _TOOLS | (_USER_TOOLS if rootless else _ROOT_TOOLS)


def _arch_of(recipe: Recipe, name: str) -> tuple[str, str]:
    try:
        return recipe.arches[host_arch()]
    except KeyError:
        raise BackendUnavailable(
            f"{name} cannot be built on this host: there is no recipe for {host_arch()}",
            f"Add a disk of your own with `vmbottle image add FILE --name {name}`",
        ) from None


class _Workshop:
    """A build folder, in which tools see root as the owner of files.

    For an ordinary user this takes a user namespace: mmdebstrap maps root and the other users in it to the user's subordinate ids. These
    must reach the folder and write to it, so it is open to everyone, inside a folder that nobody else can list.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self._rootless = os.geteuid() != 0
        # Administrators' tools are not on the path of ordinary users.
        self._path = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"

    @classmethod
    @contextmanager
    def opened(cls, say: Callable[[str], None]) -> Iterator[_Workshop]:
        """Yield a checked workshop, and remove it at the end.

        Workshops of killed processes are removed too.
        """
        for outer in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            if abandoned(outer):
                for folder in outer.iterdir():
                    cls(folder, say).clear()
                shutil.rmtree(outer, ignore_errors=True)
        # The lock says that this process lives: see `abandoned`.
        with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as new, locked(Path(new), shared=True):
            # A random folder below one that cannot be listed: others may enter it only if they know its name.
            shop = cls(Path(new) / secrets.token_hex(16), say)
            shop.folder.parent.chmod(0o711)
            shop.folder.mkdir()
            shop.folder.chmod(0o777)
            try:
                shop.check()
                yield shop
            finally:
                shop.clear()

    def check(self) -> None:
        """Check that the host has the tools, the space and the ids that the build needs."""
        tools = required_tools(rootless=self._rootless)
        missing = {tool: package for tool, package in tools.items() if not shutil.which(tool, path=self._path)}
        if missing:
            reason = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            raise BackendUnavailable(reason, f"sudo apt-get install {' '.join(sorted(set(missing.values())))}")
        place = self.folder.parent.parent
        free = shutil.disk_usage(place).free
        if free < _NEEDED_SPACE:
            reason = f"building needs {format_size(_NEEDED_SPACE)} in {place}, and only {format_size(free)} are free"
            raise BackendUnavailable(reason, "Set TMPDIR to a folder with more space")
        if self._rootless:
            self._check_namespaces()

    def _check_namespaces(self) -> None:
        for parent in self.folder.parents:
            if not parent.stat().st_mode & stat.S_IXOTH:
                reason = f"{parent} is closed to other users, and building without root uses other user ids"
                raise BackendUnavailable(reason, "Set TMPDIR to a folder that everyone may enter, such as /var/tmp")
        try:
            # Checked by doing it: sysctls, AppArmor and containers can each forbid it.
            self.run_as_root("true")
        except CatalogError as error:
            raise _no_namespaces(str(error)) from None

    def run(self, *argv: str | Path, on_line: Callable[[str], None] = lambda _: None) -> None:
        """Run a tool to its end.

        Raises:
            CatalogError: The tool failed; the message has the last lines of its output.
        """
        words = [str(word) for word in argv]
        # TMPDIR, so that what a killed tool leaves goes with this folder. LC_ALL, because the output is read here and shown.
        environment = {**os.environ, "PATH": self._path, "TMPDIR": str(self.folder), "LC_ALL": "C.UTF-8"}
        process = subprocess.Popen(  # noqa: S603 - argv list, no shell
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.folder,
            env=environment,
            umask=0o022,  # the mapped ids read what we write, and we read what they write
            start_new_session=True,  # a group that can be killed whole, and that a terminal's Ctrl-C does not reach before us
        )
        tail: deque[str] = deque(maxlen=25)
        try:
            for line in process.stdout or ():
                # Control characters of a tool's output, such as progress bars, would garble the message.
                tail.append("".join(char if char.isprintable() else " " for char in line).rstrip())
                on_line(tail[-1])
            status = process.wait()
        except BaseException:
            _end_group(process)
            raise
        finally:
            if process.stdout:
                process.stdout.close()
        if status:
            tool = next((word for word in words if word in _TOOLS), words[0])
            raise CatalogError(f"{tool} failed with status {status}. The end of its output:\n" + "\n".join(tail))

    def run_as_root(self, *argv: str | Path) -> None:
        """Run a tool that sees, and makes, files of root."""
        self.run(*(("mmdebstrap", "--unshare-helper") if self._rootless else ()), *argv)

    def _namespaces(self) -> tuple[str, ...]:
        """Return the command that separates root's mounts from the host's.

        Namespaces of their own are used if they are available, which is not so in a chroot.
        """
        try:
            self.run(*_NAMESPACES, "true")
        except CatalogError:
            return _LEASH
        return _NAMESPACES

    def bootstrap(self, *arguments: str | Path) -> None:
        """Run mmdebstrap and report its steps."""
        command = ("mmdebstrap", "--mode=unshare") if self._rootless else (*self._namespaces(), "mmdebstrap", "--mode=root")
        self.run(*command, *arguments, on_line=self._report)

    def _report(self, line: str) -> None:
        for start, step in _STEPS.items():
            if line.startswith(f"I: {start}"):
                self.say(step)

    def clear(self) -> None:
        """Remove everything in the folder, whoever owns it."""
        content = list(self.folder.iterdir())
        if content:
            try:
                # Files of mapped ids do not belong to the user, who alone could not remove them.
                # On one file system, because a mount that was left behind could lead into the host.
                self.run_as_root("rm", "-rf", "--one-file-system", "--", *content)
            except (CatalogError, OSError) as error:
                self.say(f"cannot remove {self.folder}: {error}")


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process and everything it started.

    Its id stays taken until then, so that no other group can be hit.
    """

    def ended() -> bool:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    if process.returncode is None:
        # SIGTERM first, so that mmdebstrap can unmount what it has mounted in the new system.
        os.killpg(process.pid, signal.SIGTERM)
        Deadline(_UNMOUNTING).poll(ended)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Until the others have died too, because they could still write to the folder, which is removed next.
        Deadline(2).poll(lambda: _is_empty(process.pid), every=0.02)


def _is_empty(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # none is left, or the number is someone else's already
        return True
    return False


def without_ids(files: Sequence[Path] = (Path("/etc/subuid"), Path("/etc/subgid"))) -> Remedy | None:
    """Return the command that gives this user subordinate ids to build with, see subuid(5).

    None if the user has some.
    """
    number, name = str(os.geteuid()), user_name()
    ranges = [_SUBORDINATE.findall(file.read_text()) if file.exists() else [] for file in files]
    if all(any(owner in (name, number) for owner, _, _ in entries) for entries in ranges):
        return None
    # Behind everybody else's: ids that two users share would let each at the other's files.
    # From 100000 on and 65536 of them, like useradd(8); the last one that Debian needs is nobody, 65534.
    first = max([100_000, *(int(start) + int(count) for entries in ranges for _, start, count in entries)])
    # usermod(8) knows users by their names only.
    if not name:
        return Remedy.of(*(Command(("sudo", "tee", "-a", str(file)), reads=f"{number}:{first}:65536\n") for file in files))
    ids = f"{first}-{first + 65_535}"
    return Remedy.of(Command(("sudo", "usermod", "--add-subuids", ids, "--add-subgids", ids, name)))


def _no_namespaces(output: str, files: Sequence[Path] = (Path("/etc/subuid"), Path("/etc/subgid"))) -> BackendUnavailable:
    """Return the error for a host where an ordinary user cannot act as root."""
    remedy = without_ids(files)
    if remedy:
        return BackendUnavailable("this user has no subordinate user and group ids, and building without root needs them", remedy)
    return BackendUnavailable(
        f"this host allows ordinary users no user namespace, and building without root needs one ({output})",
        "Build as root, or allow it: sudo sysctl -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 "
        "(a host has one or the other)",
    )


def _install(shop: _Workshop, recipe: Recipe, arch: str, include: Sequence[str], script: str) -> Path:
    """Install the system into a folder."""
    sources = apt_sources(recipe.suite)
    early, late, root = shop.folder / "early.tar", shop.folder / "late.tar", shop.folder / "root"
    _write_tar(early, recipe.early, {})
    _write_tar(late, {**recipe.files, **_foreign_keys(sources.values(), recipe)}, recipe.links)
    for name, text in sources.items():
        (shop.folder / name).write_text(text)
    packages = [package.format(arch=arch) for package in recipe.packages] + list(include)
    shop.bootstrap(
        # With apt in it, by which layers install packages.
        "--variant=apt",
        "--format=directory",
        f"--architectures={arch}",
        f"--include={','.join(packages)}",
        # Before the kernel is installed, because that makes the initramfs.
        f"--essential-hook=tar-in {shlex.quote(str(early))} /",
        # After all packages, whose own files these replace, and before a user's script, which finds the system as it will be.
        f"--customize-hook=tar-in {shlex.quote(str(late))} /",
        *(_run_in(shop, script) if script else ()),
        *([] if sources else [_default_keyring(recipe)]),
        recipe.suite,
        root,
        *(shop.folder / name for name in sources),
    )
    # Every machine has its own, and one that forgot would share these with all others.
    # The unit that takes the seed also runs only while there is no key: see `vmbottle-seed.service`.
    shop.run_as_root("find", root / "etc/ssh", "-name", "ssh_host_*", "-delete")
    return root


def _run_in(shop: _Workshop, script: str) -> list[str]:
    """Return the hooks of mmdebstrap that run a script in the new system and remove it."""
    archive = shop.folder / "script.tar"
    _write_tar(archive, {_SCRIPT: script if script.startswith("#!") else f"#!/bin/sh -eu\n{script}"}, {}, mode=0o700)
    hook = shop.folder / "run-script"
    hook.write_text(_RUN_SCRIPT)
    return [f"--customize-hook=tar-in {shlex.quote(str(archive))} /", f'--customize-hook=sh -eu {shlex.quote(str(hook))} "$1"']


def _make_disk(shop: _Workshop, root: Path, folder: Path, size: int) -> None:
    """Put the system on a disk without partitions, and its kernel beside it."""
    for pattern, target in (("vmlinuz-*", KERNEL), ("initrd.img-*", INITRD)):
        found = sorted(root.glob(f"boot/{pattern}"))
        if not found:
            raise CatalogError(f"the installed packages contain no boot/{pattern}")
        # The last of several kernels, by name, is taken for the newest.
        with found[-1].open("rb") as source:
            copy_in(source, folder / target)
    # Without partitions /dev/vda is the file system itself, which a guest on a larger disk just has to grow.
    raw = shop.folder / "disk.raw"
    # Lazy: initialising tables that nobody has used would fill the image with zeros.
    lazy = "lazy_itable_init=1,lazy_journal_init=1"
    shop.run_as_root("mke2fs", "-q", "-t", "ext4", "-L", "root", "-E", lazy, "-d", root, raw, f"{size >> 10}k")
    shop.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, folder / "disk.qcow2")
    with (folder / "disk.qcow2").open("rb") as disk:
        os.fsync(disk.fileno())


def _write_tar(path: Path, files: Mapping[str, str | bytes], links: Mapping[str, str], *, mode: int = 0o644) -> None:
    """Write a tar file with root's files, their folders, and links."""

    def member(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        # It belongs to root by default. mmdebstrap unpacks it inside of its namespace, where it may make such files.
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime = kind, mode, int(time.time())
        return info

    folders = {str(parent) for name in (*files, *links) for parent in PurePosixPath(name).parents} - {"."}
    with tarfile.open(path, "w") as tar:
        for name in sorted(folders):
            tar.addfile(member(name, tarfile.DIRTYPE, 0o755))
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = member(name, tarfile.REGTYPE, mode)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in links.items():
            info = member(name, tarfile.SYMTYPE, 0o777)
            info.linkname = target
            tar.addfile(info)


def _foreign_keys(sources: Iterable[str], recipe: Recipe) -> dict[str, bytes]:
    """Return the keys that sources name by path, without the archive's own.

    The guest needs them at the same paths as the host.
    """
    paths = keyrings(sources) - {recipe.keyring[0]}
    return {str(path.relative_to("/")): path.read_bytes() for path in sorted(paths) if path.is_file()}


def _default_keyring(recipe: Recipe) -> str:
    path, package = recipe.keyring
    if not path.exists():
        raise BackendUnavailable(
            f"this host has neither package sources for {recipe.suite} nor the keys of its archive", f"sudo apt-get install {package}"
        )
    return f"--keyring={path}"
