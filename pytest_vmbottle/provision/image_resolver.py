"""Resolver of a spec's image: the backend's own, a file, a declared one, or one of the catalog, made if need be."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmbottle import images
from pytest_vmbottle.errors import CatalogError, ImageMissing, SpecError
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.images import Image, ImageStore
from pytest_vmbottle.provision.context import BUILD_SECONDS
from pytest_vmbottle.provision.origins import BackendOrigin, DiskOrigin, Origin

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from pytest_vmbottle.images import DeclaredImage
    from pytest_vmbottle.provision.context import Context
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["ImageResolver"]


class ImageResolver:
    """Resolver of the images that machines are made from."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = ImageStore(context.catalog.images)
        self._store.sweep()
        self._taken: dict[tuple[str, str], Image] = {}

    def origin(self, spec: MachineSpec) -> Origin:
        """Find the image that a spec names.

        An image of the catalog is held until the context is closed, and the same for all who ask.

        Raises:
            CatalogError: There is no such image, and it cannot be made.
            SpecError: The image is for another architecture.
        """
        backend = self._context.backend
        own = backend.find_image(spec.image)
        return DiskOrigin.of(self._image(spec)) if own is None else BackendOrigin.of(own, backend)

    def known(self, spec: MachineSpec) -> Origin | None:
        """Return the image that a spec names if this process has taken it up by that name before; nothing is looked for."""
        found = self._taken.get((str(spec.image), spec.arch))
        return DiskOrigin.of(found) if found is not None else None

    def _image(self, spec: MachineSpec) -> Image:
        source, report = spec.image, self._context.settings.report
        # No name in the catalog has a slash.
        if isinstance(source, Path) or "/" in source:
            return self._store.import_path(Path(source), arch=spec.arch, progress=report)
        declared = self._context.settings.declared.get(source)
        if declared is not None and declared.kind == "path":
            # Read anew each time: the disk stays in the project, where nobody can hold it and it may change during the run.
            found = declared.make(self._store, progress=report)
        else:
            found = self._taken.get((source, spec.arch)) or self._take_up(source, spec.arch)
        if found.arch != spec.arch:
            raise SpecError(
                f"the image {found.name!r} is for {found.arch}, but the machine {spec.name!r} needs one for {spec.arch}: "
                f"write arch={found.arch!r} in the mark, or get the image for {spec.arch} as {source}-{spec.arch}"
            )
        return found

    def _take_up(self, source: str, arch: str) -> Image:
        """Return the image of a name, held: a later image of that name is for later runs."""
        declared = self._context.settings.declared.get(source)
        while True:
            found = self._named(source, arch) if declared is None else declared.get(self._store) or self._make_declared(declared)
            with suppress(FileNotFoundError):  # replaced while we reached for it
                self._context.holds.take(found.disk.parent)
                # The same image for the whole run, even if the name is given to another one meanwhile.
                return self._taken.setdefault((source, arch), found)

    def _named(self, name: str, arch: str) -> Image:
        # The first one is what `vmbottle image pull` calls an image for another architecture.
        names = (name,) if arch == host_arch() else (f"{name}-{arch}", name)
        found = (image for each in names if (image := self._sound(each, again=images.can_build(name))))
        return next(found, None) or self._build(name)

    def _sound(self, name: str, *, again: bool) -> Image | None:
        """Return the image of a name, if any; move a damaged one away if it can be made again."""
        try:
            return self._store.get(name)
        except CatalogError as error:
            if not again:
                raise
            catalog = self._context.catalog
            self._store.quarantine(name, catalog.quarantine)
            self._context.settings.warn(f"{str(error).partition('. Remove it')[0]}; it was moved to {catalog.root / 'quarantine'}")
            return None

    def _build(self, name: str) -> Image:
        if not images.can_build(name):
            there = sorted({*(image.name for image in self._store.list()), *self._context.settings.declared})
            official = name in images.CLOUD_IMAGES
            near = [] if official else difflib.get_close_matches(name, [*there, *images.RECIPES, *images.CLOUD_IMAGES], n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            how = f"Download it: vmbottle image pull {name}" if official else f"Add one: vmbottle image add FILE --name {name}"
            raise ImageMissing(
                f"there is no image {name!r} in the catalog{hint} "
                f"(there: {', '.join(there) or 'none'}; can be built: {', '.join(sorted(images.RECIPES))}). {how}",
                name=name,
            )
        with self._making(name, BUILD_SECONDS) as tell:
            # Read again with the lock held: the process that held it has probably built the image.
            return self._sound(name, again=True) or self._pull_or_build(name, tell)

    def _pull_or_build(self, name: str, tell: Callable[[str], None]) -> Image:
        registry = self._context.registry
        pulled = registry.pull_image(name) if registry else None
        if pulled is not None:
            return pulled
        built = images.build(self._store, name, progress=tell)
        if registry:
            registry.push_image(built)
        return built

    def _make_declared(self, declared: DeclaredImage) -> Image:
        with self._making(declared.stored_name, images.PULL_SECONDS if declared.kind == "url" else BUILD_SECONDS) as tell:
            return declared.get(self._store) or declared.make(self._store, progress=tell)

    def _making(self, name: str, seconds: float) -> AbstractContextManager[Callable[[str], None]]:
        # A lock for each image, because two processes must not download or build the same at once.
        return self._context.alone(f"image-{name}", f"the image {name}", seconds)
