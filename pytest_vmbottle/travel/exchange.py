"""Exchange of packs and images with a registry: what is made once is there for every computer that could make the same.

::

    pack-KEY                the pack of a key, made on the one that its annotation names
    image-KEY               the image of a key
    image-NAME-ARCH-RECIPE  the image of a recipe, as it was built first
    (any other tag)         whatever somebody gave a name to

Each artifact names what it stands on by digest, so that a digest pins all of it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import CatalogError, PackCorrupt
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.images import ImageStore, can_build, recipe_digest
from pytest_vmbottle.spec.reference import DIGEST
from pytest_vmbottle.travel.packs import Exporter, Importer, image_of
from pytest_vmbottle.travel.registry import Artifact

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.images import Image
    from pytest_vmbottle.travel.packs import Fingerprint
    from pytest_vmbottle.travel.registry import Repository

__all__ = ["Exchange", "image_tag"]

_TITLE = "org.opencontainers.image.title"
_OURS = "pytest-vmbottle."
_KEY, _SEAL, _PARENT, _IMAGE = f"{_OURS}key", f"{_OURS}seal", f"{_OURS}parent", f"{_OURS}image"
_DEEPEST = 64
"""Most packs below a pack; more is a circle."""


def image_tag(name: str) -> str:
    """Return the tag of an image, which for one that is built from a recipe has the recipe in it: another recipe is another image."""
    return "-".join(("image", name, host_arch(), *([recipe_digest(name)[:12]] if can_build(name) else [])))


@attrs.frozen(kw_only=True)
class Exchange:
    """Packs and images of a catalog, and of a repository.

    Attributes:
        catalog: The catalog.
        fingerprint: What packs depend on here.
        repository: The repository.
        say: Function that is told of the progress.
    """

    catalog: Catalog
    fingerprint: Fingerprint
    repository: Repository
    say: Callable[[str], object]

    # -- packs -----------------------------------------------------------------------------------------------------------------------

    def push(self, pack: Pack, *, tag: str = "", replace: bool = False) -> Artifact:
        """Upload a pack with what it stands on, unless that is there; return its artifact.

        Args:
            pack: The pack.
            tag: One more tag for it.
            replace: Whether to replace packs of the same keys that others have made.

        Raises:
            CatalogError: The registry did not take it, or has another pack of its key.
        """
        with Holds() as holds:
            holds.take(pack.path)
            below = self._push_below(pack, replace=replace)
            artifact = self.repository.find(f"pack-{pack.key}")
            if artifact is not None and artifact.annotations.get(_SEAL) != pack.seal and not replace:
                raise CatalogError(
                    f"{self.repository.reference.repository} has another pack of the same key {pack.key[:12]} ({pack.manifest.name}), made "
                    f"elsewhere: pull that one after `vmbottle pack rm {pack.key[:12]}`, or replace it with --replace"
                )
            annotations = {_TITLE: pack.manifest.name, _KEY: pack.key, _SEAL: pack.seal, **below}
            if artifact is None or dict(artifact.annotations) != annotations:
                with self.catalog.staging() as folder:
                    file = folder / "pack.vmpack"
                    self._exporter.write(pack, file, parents=False)
                    artifact = self.repository.push(f"pack-{pack.key}", file, annotations)
            else:
                self.say(f"{pack.manifest.name} is there already")
            if tag:
                self.repository.tag(artifact, tag)
            return artifact

    def _push_below(self, pack: Pack, *, replace: bool) -> dict[str, str]:
        """Upload what a pack stands on, and return how its artifact names that."""
        if pack.manifest.parent is not None:
            packs.check_parent(pack)
            return {_PARENT: self.push(packs.read(self.catalog.pack(pack.manifest.parent)), replace=replace).digest}
        image = image_of(self.catalog, pack.manifest)
        if image is None:
            raise CatalogError(f"the image of the pack {pack.key[:12]} ({pack.manifest.name}) is not among the images")
        return {_IMAGE: self._push_content(image).digest}

    def pull(self, which: str) -> list[Pack]:
        """Download the pack of a tag or digest, and what it stands on where that is not here; return those that are new, lowest first.

        Raises:
            CatalogError: It is not there, is damaged, or fits another computer. What it stands on may be here now.
        """
        artifact = self.repository.find(which)
        if artifact is None:
            raise CatalogError(f"{self.repository.reference.repository} has no pack {which}")
        return self._pulled(artifact)

    def pull_if_there(self, key: str) -> list[Pack]:
        """Download the pack of a key as `pull` does; return nothing if there is none."""
        artifact = self.repository.find(f"pack-{key}")
        return self._pulled(artifact) if artifact is not None else []

    def _pulled(self, artifact: Artifact | None) -> list[Pack]:
        missing: list[Artifact] = []
        while artifact is not None and not self._is_here(artifact) and len(missing) < _DEEPEST:
            missing.insert(0, artifact)
            parent = artifact.annotations.get(_PARENT)
            artifact = self._below(parent) if parent else None
        if missing and (image := missing[0].annotations.get(_IMAGE)):
            self._pull_image_below(self._below(image))
        new: list[Pack] = []
        for each in missing:
            with self.repository.fetched(each) as file:
                new += self._importer.read(file)
        return new

    def _pull_image_below(self, artifact: Artifact) -> None:
        store, key, name = ImageStore(self.catalog.images), artifact.annotations.get(_KEY, ""), artifact.annotations.get(_TITLE, "")
        if all(image.key != key for image in store.list()):
            self._read_image(artifact, name if name not in store.names() else f"{name}-{key[:6]}")

    def _read_image(self, artifact: Artifact, name: str) -> Image:
        with self.repository.fetched(artifact) as file:
            image = self._importer.read_image(file, name=name)
        if image.key != artifact.annotations.get(_KEY):
            raise CatalogError(
                f"{self.repository.reference.repository} has another image than it says, imported as {image.name}: remove it"
            )
        return image

    def _below(self, digest: str) -> Artifact:
        found = self.repository.find(digest) if re.fullmatch(DIGEST, digest) else None
        if found is None:
            raise CatalogError(f"{self.repository.reference.repository} lacks what the pack stands on, {digest[:80]}: push it again")
        return found

    def _is_here(self, artifact: Artifact) -> bool:
        key = artifact.annotations.get(_KEY, "")
        with suppress(FileNotFoundError, PackCorrupt):
            # A key becomes the name of a folder.
            return re.fullmatch("[0-9a-f]{64}", key) is not None and packs.read(self.catalog.pack(key)).seal == artifact.annotations.get(
                _SEAL
            )
        return False

    # -- images ----------------------------------------------------------------------------------------------------------------------

    def push_image(self, image: Image, *, tag: str = "", replace: bool = False) -> Artifact:
        """Upload an image, unless it is there; return its artifact.

        Args:
            image: The image.
            tag: Its tag; by default `image_tag`.
            replace: Whether to take the tag from another image.

        Raises:
            CatalogError: The registry did not take it, or has another image under the tag.
        """
        tag = tag or image_tag(image.name)
        named = self.repository.find(tag)
        if named is not None and named.annotations.get(_KEY) == image.key:
            self.say(f"the image {image.name} is there already")
            return named
        if named is not None and not replace:
            raise CatalogError(
                f"{self.repository.reference.repository} has another image under {tag}, made elsewhere: replace it with --replace"
            )
        artifact = self._push_content(image)
        self.repository.tag(artifact, tag)
        return artifact

    def _push_content(self, image: Image) -> Artifact:
        """Upload an image under its key, by which packs find it whatever its name is."""
        artifact = self.repository.find(f"image-{image.key}")
        if artifact is not None:
            return artifact
        with self.catalog.staging() as folder:
            file = folder / "image.vmpack"
            self._exporter.write_image(image, file)
            return self.repository.push(f"image-{image.key}", file, {_TITLE: image.name, _KEY: image.key})

    def pull_image(self, which: str, *, name: str = "") -> Image:
        """Download the image of a tag or digest, unless the image of its name is the one.

        Args:
            which: The tag or digest; by default the `image_tag` of the name.
            name: The image's name here; by default the one that it has there.

        Raises:
            CatalogError: It is not there, is damaged, or another image has its name.
        """
        which = which or image_tag(name)
        image = self.pull_image_if_there(which, name=name)
        if image is None:
            raise CatalogError(f"{self.repository.reference.repository} has no image {which}")
        return image

    def pull_image_if_there(self, which: str, *, name: str = "") -> Image | None:
        """Download the image of a tag or digest as `pull_image` does; return None if there is none."""
        artifact = self.repository.find(which)
        if artifact is None or _SEAL in artifact.annotations:
            return None
        name = name or artifact.annotations.get(_TITLE, "")
        there = next((image for image in ImageStore(self.catalog.images).list() if image.name == name), None)
        if there is not None and there.key == artifact.annotations.get(_KEY):
            self.say(f"the image {name} is there already")
            return there
        return self._read_image(artifact, name)

    @property
    def _exporter(self) -> Exporter:
        return Exporter(catalog=self.catalog, fingerprint=self.fingerprint, say=self.say)

    @property
    def _importer(self) -> Importer:
        return Importer(catalog=self.catalog, fingerprint=self.fingerprint, say=self.say)
