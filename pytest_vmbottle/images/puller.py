"""Downloads of disk images into the store: official ones by name, others by URL and checksum."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import content_digest
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.images.cloud import CLOUD_IMAGES, Checksum, CloudImage, checksum_in
from pytest_vmbottle.images.disk_format import inspect, opened
from pytest_vmbottle.images.download import Downloads, Partial, Transfer, check_url, fetch_text
from pytest_vmbottle.images.store import Image, ImageStore, Traits, check_name, default_firmware, explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["PULL_SECONDS", "PullOptions", "pull", "pull_url", "pulled_name"]

PULL_SECONDS = 2 * 3600.0
"""Seconds that a download may take. An unfinished file is kept, and the next download resumes it."""
# Limits on what a server can make us store. Official images are far smaller; of others nothing is known.
_MAX_CLOUD = 8 << 30
_MAX_SIZE = 64 << 30
_ARCHIVES = (".xz", ".gz", ".zst", ".bz2", ".zip", ".7z", ".tar", ".tgz")


@attrs.frozen(kw_only=True)
class PullOptions:
    """Options of a download.

    Attributes:
        update: Whether to replace an image of the same name and other content.
        offline: Whether to use only what is stored already.
        progress: Function that gets a line for each step.
        meter: Function that gets a line about the progress of the download from time to time; by default `progress`.
        every: Seconds between two of those lines.
    """

    update: bool = False
    offline: bool = False
    progress: Callable[[str], None] = lambda _: None
    meter: Callable[[str], None] | None = None
    every: float = 5.0


def pulled_name(recipe: str, arch: str | None = None) -> str:
    """Return the default name of an official image in the store.

    It is the recipe's name, with the architecture if it is a foreign one.
    """
    return recipe if arch in (None, host_arch()) else f"{recipe}-{arch}"


def pull(store: ImageStore, recipe: str, *, name: str | None = None, arch: str | None = None, options: PullOptions | None = None) -> Image:
    """Download an official cloud image into the store.

    Nothing is downloaded if the stored image is the one that is published.

    Args:
        store: The store to add it to.
        recipe: One of `CLOUD_IMAGES`.
        name: The image's name; by default `pulled_name`.
        arch: The architecture, as `uname -m` names it; by default the host's.
        options: Options of the download.

    Raises:
        CatalogError: There is no such image, it cannot be downloaded, its checksum differs, or another image has the name. Nothing was
            added.
    """
    options = options or PullOptions()
    chosen, arch, name = _recipe(recipe), arch or host_arch(), name or pulled_name(recipe, arch)
    if arch not in chosen.arches:
        raise CatalogError(f"{recipe} is not published for {arch}, only for {', '.join(sorted(chosen.arches))}")
    check_name(name)
    there = _stored(store, name)
    # Whatever is stored under the name, because offline there is no published checksum to compare with.
    if options.offline:
        return _offline(there, name, options)
    url = chosen.url(arch)
    wanted = _Wanted(
        url=url,
        checksum=_published(chosen, arch),
        name=name,
        arch=arch,
        traits=chosen.traits(arch),
        description=chosen.description,
        max_size=_MAX_CLOUD,
    )
    return _ensure(store, wanted, options)


def pull_url(  # noqa: PLR0913 - an image has many parts
    store: ImageStore,
    url: str,
    *,
    sha256: str,
    name: str,
    arch: str | None = None,
    traits: Traits | None = None,
    description: str = "",
    options: PullOptions | None = None,
) -> Image:
    """Download a disk image from any URL into the store.

    No server is asked if the stored image has this digest.

    Args:
        store: The store to add it to.
        url: The https URL.
        sha256: The digest that its content must have.
        name: The image's name.
        arch, traits: As for `ImageStore.add`.
        description: A few words for people; by default the URL.
        options: Options of the download.

    Raises:
        CatalogError: It cannot be downloaded, has another digest or is not a disk image, or another image has the name. Nothing was added.
    """
    check_url(url)
    check_name(name)
    options, arch = options or PullOptions(), arch or host_arch()
    try:
        checksum = Checksum("sha256", sha256.strip().lower().removeprefix("sha256:"))
    except ValueError:
        raise CatalogError(f"{sha256!r} is not a sha256: it has 64 hexadecimal digits") from None
    _check_packed(url)
    wanted = _Wanted(
        url=url,
        checksum=checksum,
        name=name,
        arch=arch,
        traits=traits or Traits(firmware=default_firmware(arch)),
        description=description or f"from {url}",
        max_size=_MAX_SIZE,
    )
    there = _stored(store, name)
    if options.offline and (there is None or not wanted.is_content_of(there)):
        return _offline(None, name, options)
    return _ensure(store, wanted, options)


@attrs.frozen(kw_only=True)
class _Wanted:
    """The image that the store is to have in the end."""

    url: str
    checksum: Checksum
    name: str
    arch: str
    traits: Traits
    description: str
    max_size: int

    def is_content_of(self, image: Image) -> bool:
        """Tell whether an image's disk has this checksum."""
        if self.checksum.algorithm == "sha256":
            return image.sha256 == self.checksum.digest
        # A sha512 is not stored, so the disk is read; an image's own digest is a sha256.
        with image.disk.open("rb") as disk:
            return content_digest(disk.fileno(), algorithm=self.checksum.algorithm) == self.checksum.digest


def _recipe(name: str) -> CloudImage:
    if name not in CLOUD_IMAGES:
        close = difflib.get_close_matches(name, CLOUD_IMAGES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CatalogError(
            f"there is no image {name!r} to pull.{hint} The names are: {', '.join(CLOUD_IMAGES)}. Pull others by URL, with --sha256"
        )
    return CLOUD_IMAGES[name]


def _stored(store: ImageStore, name: str) -> Image | None:
    try:
        return store.get(name)
    except CatalogError:  # a damaged one is fetched again
        return None


def _offline(there: Image | None, name: str, options: PullOptions) -> Image:
    if there is None:
        raise CatalogError(
            f"{name} is not in the catalog, and --offline downloads nothing: pull it without --offline, or copy its disk here and run "
            f"`vmbottle image add FILE --name {name}`"
        )
    options.progress(f"{name} is in the catalog; not checked for a newer one (--offline)")
    return there


def _published(recipe: CloudImage, arch: str) -> Checksum:
    """Fetch the checksum that the image's publisher states now."""
    url, file = recipe.checksums_url(arch), recipe.url(arch).rpartition("/")[2]
    text = fetch_text(url, what="the checksum file")
    try:
        found = checksum_in(text, file, recipe.algorithm)
    except ValueError as error:
        raise CatalogError(f"{url} cannot be used: {error}. Try again later") from None
    if found is None:
        raise CatalogError(
            f"{url} has no {recipe.algorithm} of {file}: the image may have been renamed. Find it, and pull it by `--sha256` and its URL"
        )
    return found


def _check_packed(url: str) -> None:
    # Told by the name, before a long download. Archives under other names are found by their first bytes, after it.
    suffix = next((suffix for suffix in _ARCHIVES if urlsplit(url).path.lower().endswith(suffix)), None)
    if suffix:
        raise CatalogError(f"{url} is packed ({suffix}): download and unpack it, then run `vmbottle image add FILE --name NAME`")


def _ensure(store: ImageStore, wanted: _Wanted, options: PullOptions) -> Image:
    there = _stored(store, wanted.name)
    if there is not None and wanted.is_content_of(there):
        if (there.arch, there.traits) == (wanted.arch, wanted.traits):
            options.progress(f"{wanted.name} is up to date")
            return there
        # The same disk with other traits, which needs no download.
        return _add(store, there.disk, wanted)
    if there is not None and not options.update:
        raise _pinned(there, wanted)
    with explained(f"download {wanted.url}"):
        return _download(store, wanted, options)


def _pinned(there: Image, wanted: _Wanted) -> CatalogError:
    what = "built here" if there.prepared else there.description or "added by hand"
    return CatalogError(
        f"the image {wanted.name!r} in the catalog ({what}, sha256 {there.sha256[:12]}, of {there.created}) differs from what "
        f"{wanted.url} has now ({wanted.checksum.algorithm} {wanted.checksum.digest[:12]}). Replace it with `--update`: its packs are then "
        f"built again. Or keep both: give the new one another name with `--name`"
    )


def _download(store: ImageStore, wanted: _Wanted, options: PullOptions) -> Image:
    deadline = Deadline(PULL_SECONDS)
    # By checksum and not by URL, so that a download goes on after the publisher has moved the file, and never with other content.
    key = f"{wanted.checksum.algorithm}-{wanted.checksum.digest}"
    with Downloads(store.root / "downloads").partial(key, deadline=deadline, waiting=options.progress) as partial:
        transfer = Transfer(
            url=wanted.url,
            partial=partial,
            what=f"the image {wanted.name}",
            max_size=wanted.max_size,
            deadline=deadline,
            progress=options.meter or options.progress,
            every=options.every,
        )
        resumed = partial.size
        options.progress(f"downloading {wanted.url}" + (f" from {format_size(resumed)} on" if resumed else ""))
        transfer.run()
        if resumed and _digest(partial, wanted) != wanted.checksum.digest:  # the server did not tell that its file is another one now
            options.progress("the partial download does not match: downloading the whole file again")
            partial.restart("")
            transfer.run()
        try:
            _check(partial, wanted)
        except CatalogError:
            # Refused: no later attempt can use it.
            partial.remove()
            raise
        options.progress("verified; adding it to the images")
        # If that fails, as on a full disk, the next attempt has the whole file already.
        image = _add(store, partial.path, wanted)
        partial.remove()
        return image


def _digest(partial: Partial, wanted: _Wanted) -> str:
    with partial.path.open("rb") as file:
        return content_digest(file.fileno(), algorithm=wanted.checksum.algorithm)


def _check(partial: Partial, wanted: _Wanted) -> None:
    """Check a downloaded file's checksum and its disk format."""
    actual = _digest(partial, wanted)
    if actual != wanted.checksum.digest:
        raise CatalogError(
            f"{wanted.url} has the wrong checksum: its {wanted.checksum.algorithm} is {actual}, not {wanted.checksum.digest}. The download "
            f"was deleted. The server may be in the middle of an update, or somebody has changed the file: try again in an hour"
        )
    try:
        # `add` would do it again, but its error would name the partial file and not the URL.
        with opened(partial.path) as file:
            inspect(file, partial.path)
    except CatalogError as error:
        reason = str(error).replace(str(partial.path), wanted.url)
        raise CatalogError(f"{reason}. Its checksum is right; the download was deleted") from None


def _add(store: ImageStore, disk: Path, wanted: _Wanted) -> Image:
    # Replaces without asking, because `_ensure` has already refused what must stay.
    return store.add(disk, name=wanted.name, arch=wanted.arch, description=wanted.description, traits=wanted.traits, replace=True)
