"""Registry of a run: what is missing here comes from it, and what is made here goes to it; a run never fails by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import CatalogError, PackCorrupt
from pytest_vmbottle.images import can_build
from pytest_vmbottle.spec.reference import Reference
from pytest_vmbottle.travel.exchange import Exchange, image_tag
from pytest_vmbottle.travel.packs import image_of
from pytest_vmbottle.travel.registry import RegistryError, Repository

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.images import Image
    from pytest_vmbottle.travel.packs import Fingerprint

__all__ = ["RunRegistry", "open_exchange"]

T = TypeVar("T")


def open_exchange(reference: Reference, catalog: Catalog, fingerprint: Fingerprint, say: Callable[[str], None]) -> Exchange:
    """Return the exchange between a catalog and a repository."""
    repository = Repository(reference, say=say, downloads=catalog.root / "downloads")
    return Exchange(catalog=catalog, fingerprint=fingerprint, repository=repository, say=say)


class RunRegistry:
    """A repository that a run asks before it makes something."""

    def __init__(self, exchange: Exchange, *, push: bool, replace: bool, warn: Callable[[str], None]) -> None:
        """Take what the user has set.

        Args:
            exchange: The exchange with the repository.
            push: Whether what is made here goes to it.
            replace: Whether that replaces what it has of the same key.
            warn: Function that gets warnings.
        """
        self._push, self._replace, self._catalog, self._warn = push, replace, exchange.catalog, warn
        self._exchange: Exchange | None = exchange

    def pull_pack(self, key: str) -> bool:
        """Download the pack of a key, if it is there; return whether it is here now."""
        return bool(self._tried(f"pull the pack {key[:12]}", lambda exchange: exchange.pull_if_there(key)))

    def push_pack(self, pack: Pack) -> bool:
        """Upload a pack that was made here, if that is wanted; return whether it is there now."""
        image = self._image_below(pack) if self._push else None
        # Others have neither a disk that lies in its own place, nor an image of a backend's own.
        if image is None:
            return False
        # By its name as well, which others ask for first: with an image of their own they would never ask for the pack.
        if can_build(image.name):
            self.push_image(image)
        what = f"push the pack of {pack.manifest.name}"
        return self._tried(what, lambda exchange: exchange.push(pack, replace=self._replace)) is not None

    def pull_image(self, name: str) -> Image | None:
        """Download the image of a recipe, if it is there."""
        return self._tried(f"pull the image {name}", lambda exchange: exchange.pull_image_if_there(image_tag(name), name=name))

    def push_image(self, image: Image) -> None:
        """Upload an image that was made here from a recipe, if that is wanted."""
        if self._push:
            self._tried(
                f"push the image {image.name}",
                lambda exchange: exchange.push_image(image, tag=image_tag(image.name), replace=self._replace),
            )

    def _image_below(self, pack: Pack) -> Image | None:
        lowest = pack
        while lowest.manifest.parent is not None:
            lowest = packs.read(self._catalog.pack(lowest.manifest.parent))
        return image_of(self._catalog, lowest.manifest)

    def _tried(self, what: str, do: Callable[[Exchange], T]) -> T | None:
        """Do something with the repository; warn if that fails, and do without it from then on if it cannot be used at all."""
        if self._exchange is None:
            return None
        try:
            return do(self._exchange)
        except RegistryError as error:
            self._exchange = None
            self._warn(f"could not {what}, and the registry is not asked any more: {error}")
        except (CatalogError, PackCorrupt) as error:
            self._warn(f"could not {what}: {error}")
        return None
