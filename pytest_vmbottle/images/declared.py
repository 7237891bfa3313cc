"""Images that a project declares.

They stand in `[tool.vmbottle.images.NAME]` of its pyproject.toml, or in `[images.NAME]` of a vmbottle.toml.

Each is a disk in the project (`path`), a download (`url` and `sha256`) or a build (`build`). Downloads and builds are stored under the
declaration's name and a digest of its content: a changed declaration is made again, and two projects can mean different images by one name.
"""

from __future__ import annotations

import difflib
import errno
import re
import stat
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.digests import content_digest, digest
from pytest_vmbottle.images.builder import build, check_package
from pytest_vmbottle.images.disk_format import opened
from pytest_vmbottle.images.download import check_url
from pytest_vmbottle.images.puller import PullOptions, pull_url
from pytest_vmbottle.images.recipes import RECIPES
from pytest_vmbottle.images.store import Firmware, Image, ImageStore, Readiness, Traits, check_name, default_firmware, explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = ["DeclaredImage", "declared_images", "find_declared_images"]

Kind = Literal["path", "url", "build"]

_BOOT = ("arch", "firmware", "user", "readiness")
# What may be said of each kind, besides the key that makes it one.
_KEYS: Mapping[Kind, tuple[str, ...]] = {
    "path": ("sha256", *_BOOT, "kernel", "initrd", "cmdline"),
    "url": ("sha256", *_BOOT),
    "build": ("packages", "script", "run"),
}
_CHOICES = {"arch": ("x86_64", "aarch64"), "firmware": get_args(Firmware), "readiness": get_args(Readiness)}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PYPROJECT, _OWN = "pyproject.toml", "vmbottle.toml"
# Enough to tell a project's declarations apart. With a hyphen they leave 87 of the 100 characters of a name in the store.
_DIGITS = 12


@attrs.frozen(kw_only=True)
class DeclaredImage:
    """An image that a project declares.

    Attributes:
        name: The image's name in tests.
        origin: The file and the table of the declaration.
        kind: The kind of source: a path, a download or a build.
        source: The absolute path, the URL, or the recipe.
        sha256: The digest that its disk must have; empty if any will do.
        packages: Packages to install in a build, besides the recipe's.
        script: The script that is run in it during the build, or an empty string.
        arch: The architecture, as `uname -m` names it.
        traits: Properties of its system, such as its firmware.
        kernel, initrd, cmdline: For a direct boot of a disk in the project.
    """

    name: str
    # Not compared, because the same declaration in two projects is one image.
    origin: str = attrs.field(eq=False)
    kind: Kind
    source: str
    sha256: str = ""
    packages: tuple[str, ...] = ()
    script: str = ""
    arch: str
    traits: Traits
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""

    @property
    def stored_name(self) -> str:
        """The image's name in the store: its own and a digest of its declaration."""
        # A URL does not count, because the sha256 says what is downloaded, wherever it comes from.
        content = (self.kind, self.source if self.kind == "build" else "", self.sha256, self.packages, self.script, self.arch)
        return f"{self.name}-{digest('declared', content, attrs.asdict(self.traits))[:_DIGITS]}"

    def get(self, store: ImageStore) -> Image | None:
        """Return the image if it needs no build or download, or None.

        Raises:
            CatalogError: The stored image or the disk cannot be used.
        """
        with self._named():
            found = self._in_place(store, None) if self.kind == "path" else store.get(self.stored_name)
            return attrs.evolve(found, name=self.name) if found is not None else None

    def make(self, store: ImageStore, *, progress: Callable[[str], None] = lambda _: None) -> Image:
        """Build or download the image, and store it.

        Raises:
            BackendUnavailable: This host lacks a tool or right that it needs.
            CatalogError: It failed; nothing was stored.
        """
        with self._named():
            return attrs.evolve(self._made(store, progress), name=self.name)

    def _made(self, store: ImageStore, progress: Callable[[str], None]) -> Image:
        name = self.stored_name
        if self.kind == "path":
            return self._in_place(store, progress)
        if self.kind == "build":
            return build(store, self.source, name=name, include=self.packages, script=self.script, progress=progress)
        options = PullOptions(progress=progress)
        return pull_url(store, self.source, sha256=self.sha256, name=name, arch=self.arch, traits=self.traits, options=options)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the declaration in the errors of a block."""
        try:
            yield
        except CatalogError as error:
            raise CatalogError(f"the image {self.name!r} ({self.origin}): {error}") from error

    def _in_place(self, store: ImageStore, progress: Callable[[str], None] | None) -> Image:
        image = store.import_path(Path(self.source), arch=self.arch, traits=self.traits, progress=progress)
        if self.sha256 not in ("", image.sha256):
            raise CatalogError(f"{self.source} has the sha256 {image.sha256}, but {self.sha256} is declared")
        if self.kernel is None:
            return image
        # The kernel is not in the store, so its content has to be part of the key.
        key = digest(image.key, _digest(self.kernel), _digest(self.initrd) if self.initrd else "", self.cmdline)
        return attrs.evolve(image, kernel=self.kernel, initrd=self.initrd, cmdline=self.cmdline, key=key)


def _digest(path: Path) -> str:
    with explained(f"read {path}"), opened(path) as file:
        return content_digest(file.fileno())


def declared_images(folder: Path) -> dict[str, DeclaredImage]:
    """Return the images that the files of a folder declare, by name.

    Raises:
        SpecError: A declaration is invalid; the message names the file and the key.
    """
    found: dict[str, DeclaredImage] = {}
    for file, prefix, tables in _declaring(folder):
        for name, table in tables.items():
            origin = f"{file}: {prefix}.{name}"
            if name in found:
                raise SpecError(f"{origin}: is declared twice, see also {found[name].origin}; keep one of them")
            found[name] = _Table(name, origin, file.parent, table).image()
    return found


def find_declared_images(start: Path) -> dict[str, DeclaredImage]:
    """Find the images declared in the nearest folder, from `start` upwards, that declares any.

    A parent folder that everybody may write to, such as /tmp, ends the search, because declarations contain scripts that are run.

    Raises:
        SpecError: A declaration is invalid.
    """
    start = start.resolve()
    for folder in (start, *start.parents):
        # The start itself is trusted: whoever can write there can change the tests too.
        if folder != start and folder.stat().st_mode & stat.S_IWOTH:
            break
        if list(_declaring(folder)):
            return declared_images(folder)
    return {}


def _declaring(folder: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Yield the declaring files of a folder, each with the key of its table and the table."""
    own, pyproject = folder / _OWN, folder / _PYPROJECT
    content = _content(own)
    if content is not None:
        yield own, "images", _images(_parsed(own, content), own, "")
    content = _content(pyproject)
    # Others' files are not read more closely than it takes to see that they do not speak of us.
    if content is not None and b"vmbottle" in content:
        tool = _parsed(pyproject, content).get("tool")
        ours = tool.get("vmbottle") if isinstance(tool, dict) else None
        if ours is not None:
            yield pyproject, "tool.vmbottle.images", _images(ours, pyproject, "tool.vmbottle.")


def _content(file: Path) -> bytes | None:
    """Return the content of a file; None if it does not exist or is another project's and unreadable."""
    try:
        return file.read_bytes()
    except OSError as error:
        # Folders above may be other users', so missing rights are no error. Our own file must be readable in every other way: a folder
        # in its place, for example, is a mistake of the project's.
        if file.name != _OWN or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return None
        raise SpecError(f"{file}: cannot be read: {error.strerror}") from None


def _parsed(file: Path, content: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode())
    # Text that is not UTF-8 is a ValueError too. tomllib recurses, so deeply nested arrays exhaust its stack.
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{file}: cannot be read as TOML: {error}") from None


def _images(table: object, file: Path, prefix: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise SpecError(f"{file}: {prefix.rstrip('.')}: takes a table")
    for key in table:
        if key != "images":
            raise SpecError(f"{file}: {prefix}{key}: is not known: declare images in [{prefix}images.NAME]")
    images = table.get("images", {})
    if not isinstance(images, dict):
        raise SpecError(f"{file}: {prefix}images: takes a table for each image: [{prefix}images.NAME]")
    return images


class _Table:
    """The table of one declaration, and its checks."""

    def __init__(self, name: str, origin: str, folder: Path, table: object) -> None:
        self._name, self._origin, self._folder = name, origin, folder
        try:
            # In the store a digest follows the name, and both together must be valid.
            check_name(f"{name}-{'0' * _DIGITS}")
        except CatalogError:
            raise SpecError(
                f"{origin}: cannot name an image: use letters, digits, '.', '_' and '-', a letter or digit first, 87 at most"
            ) from None
        if not isinstance(table, dict):
            raise SpecError(f"{origin}: takes a table with one of the keys {', '.join(_KEYS)}")
        self._table = table

    def image(self) -> DeclaredImage:
        kind = self._kind()
        for key, value in self._table.items():
            self._check(kind, key, value)
        return DeclaredImage(
            name=self._name,
            origin=self._origin,
            kind=kind,
            source={"path": self._path, "url": self._url, "build": self._recipe}[kind](),
            sha256=self._sha256(),
            packages=self._packages(),
            script=self._script(),
            arch=self._arch,
            traits=self._traits(kind),
            kernel=self._file("kernel"),
            initrd=self._file("initrd"),
            cmdline=self._cmdline(),
        )

    def _wrong(self, key: str, what: str) -> SpecError:
        return SpecError(f"{self._origin}.{key}: {what}")

    def _kind(self) -> Kind:
        kinds = [kind for kind in _KEYS if kind in self._table]
        if len(kinds) == 1:
            return kinds[0]
        if kinds:
            raise SpecError(f"{self._origin}: has both {' and '.join(kinds)}: an image comes from one place")
        # A misspelt key is why, perhaps.
        known = {key for keys in _KEYS.values() for key in keys}
        for key in self._table:
            if key not in known:
                raise self._unknown(key, [*_KEYS, *known])
        raise SpecError(f"{self._origin}: does not say where the image comes from: add one of the keys {', '.join(_KEYS)}")

    def _unknown(self, key: str, known: Iterable[str]) -> SpecError:
        known = list(known)
        close = difflib.get_close_matches(key, known, n=1)
        return self._wrong(key, f"is not known: did you mean {close[0]!r}?" if close else f"is not known: there are {', '.join(known)}")

    def _check(self, kind: Kind, key: str, value: object) -> None:
        allowed = (kind, *_KEYS[kind])
        if key not in allowed:
            others = [other for other in _KEYS if key in _KEYS[other]]
            if others:
                raise self._wrong(key, f"goes with {' or '.join(others)}, not with {kind}")
            raise self._unknown(key, allowed)
        if key == "packages":
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise self._wrong(key, f"takes a list of names, not {value!r}")
        # TOML can write a NUL, which no path and no argument of a program can have.
        elif not isinstance(value, str) or not value or "\0" in value:
            raise self._wrong(key, f"takes a text, not {value!r}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise self._wrong(key, f"takes {' or '.join(_CHOICES[key])}, not {value!r}")

    @property
    def _arch(self) -> str:
        return str(self._table.get("arch", host_arch()))

    def _traits(self, kind: Kind) -> Traits:
        given: dict[str, Any] = {key: self._table[key] for key in ("firmware", "user", "readiness") if key in self._table}
        try:
            return Traits(**{"firmware": default_firmware(self._arch), "prepared": kind == "build", **given})
        except ValueError:
            raise self._wrong("user", f"{self._table.get('user')!r} is not the name of a user") from None

    def _file(self, key: str) -> Path | None:
        return self._folder / self._table[key] if key in self._table else None

    def _path(self) -> str:
        return str(self._folder / self._table["path"])

    def _url(self) -> str:
        url = str(self._table["url"])
        try:
            check_url(url)
        except CatalogError as error:
            raise self._wrong("url", str(error)) from None
        # Also needed by `stored_name`, in which the digest stands for the content, and the URL does not count.
        if "sha256" not in self._table:
            raise self._wrong("sha256", "is missing: a download needs one")
        return url

    def _recipe(self) -> str:
        recipe = str(self._table["build"])
        if recipe not in RECIPES:
            close = difflib.get_close_matches(recipe, RECIPES, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(RECIPES))}"
            raise self._wrong("build", f"there is no recipe for {recipe!r}: {hint}")
        return recipe

    def _sha256(self) -> str:
        given = str(self._table.get("sha256", "")).strip().lower().removeprefix("sha256:")
        if given and not _SHA256.fullmatch(given):
            raise self._wrong("sha256", f"{self._table['sha256']!r} is not a sha256: it has 64 hexadecimal digits")
        return given

    def _packages(self) -> tuple[str, ...]:
        for package in self._table.get("packages", ()):
            try:
                check_package(package)
            except CatalogError as error:
                raise self._wrong("packages", str(error)) from None
        return tuple(self._table.get("packages", ()))

    def _script(self) -> str:
        file = self._file("script")
        if file is None:
            return str(self._table.get("run", ""))
        if "run" in self._table:
            raise self._wrong("run", "cannot be used with script: give the commands in a file or here, not both")
        try:
            # The content and not the path, so that a changed script gives another stored name, and with it another build.
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise self._wrong("script", f"{file} cannot be read: {reason}") from None

    def _cmdline(self) -> str:
        if "kernel" not in self._table and ("initrd" in self._table or "cmdline" in self._table):
            raise self._wrong("kernel", "is missing: an initrd or a cmdline needs one")
        if "kernel" in self._table and "cmdline" not in self._table:
            raise self._wrong("cmdline", "is missing: it tells the kernel where its root is, for example 'root=/dev/vda1 rw console=ttyS0'")
        return str(self._table.get("cmdline", ""))
