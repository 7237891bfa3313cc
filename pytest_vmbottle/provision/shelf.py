"""The packs that are there: whole, on the very packs they were made on, and held for as long as they may be needed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_vmbottle import packs
from pytest_vmbottle.errors import PackCorrupt

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.packs import Pack
    from pytest_vmbottle.provision.context import Context

__all__ = ["Shelf"]


class Shelf:
    """The packs of a catalog that this process has found whole."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._usable: dict[str, tuple[object, Pack]] = {}
        self._counted: set[str] = set()

    def get(self, key: str) -> Pack | None:
        """The pack of this key, if it is there and recent enough. A damaged one may be being made anew: who holds its lock judges it.

        Raises:
            PackCorrupt: It is damaged.
        """
        before = self._context.settings.rebuild_before
        try:
            if before is not None and packs.read(self._context.catalog.pack(key)).manifest.created < before:
                return None  # and is not taken up: it goes when nobody else needs it
            pack = self.checked(key)
        except FileNotFoundError:
            return None
        if key not in self._counted:
            self._counted.add(key)
            self._context.tally.reused += 1
        return pack

    def get_or_put_aside(self, key: str) -> Pack | None:
        """The same; a damaged one is moved out of the way. To be called with its lock held."""
        try:
            return self.get(key)
        except PackCorrupt as error:
            with suppress(OSError):
                aside = self._put_aside(self._context.catalog.pack(key), "a damaged pack")
                where = f"it was moved to {aside} and" if aside else "it stays for those who use it, and"
                self._context.settings.warn(f"{error}; {where} is built again")
            return None

    def _put_aside(self, folder: Path, why: str) -> Path | None:
        """Moves a pack out of the way, unless somebody else holds it: then it stays until that ends."""
        self._context.holds.release(folder)
        aside = self._context.catalog.quarantine(folder)
        if aside is not None:
            self._context.catalog.ledger.keep(aside, why)
        return aside

    def checked(self, key: str) -> Pack:
        """The pack of this key and, beneath it, the very packs it was made on: read wholly the first time, afterwards by a glance.

        Raises:
            FileNotFoundError: There is none.
            PackCorrupt: Its files, or those of a pack beneath it, are not what they were.
        """
        known = self._usable.pop(key, None)
        with suppress(PackCorrupt):  # made anew meanwhile, perhaps
            if known is not None and known[0] == known[1].stamp():
                self._usable[key] = known
                return known[1]
        pack = packs.read(self._taken_up(key))
        pack.verify()
        if pack.manifest.parent is not None:
            self._check_parent(pack, pack.manifest.parent)
        pack.note_use()
        self._usable[key] = (pack.stamp(), pack)
        return pack

    def _taken_up(self, key: str) -> Path:
        """The folder of a pack, held; somebody may replace the pack while we reach for it."""
        while True:
            folder = self._context.catalog.pack(key)
            try:
                self._context.holds.take(folder)
            except FileNotFoundError:
                if self._context.catalog.pack(key) == folder:
                    raise
            else:
                return folder

    def made(self, key: str) -> Pack:
        """The pack of this key, which was made a moment ago."""
        self._counted.add(key)
        self._context.tally.built += 1
        return self.checked(key)

    def condemn(self, pack: Pack) -> None:
        """Puts a pack aside that could not be poured."""
        self._usable.pop(pack.key, None)
        with suppress(OSError):
            self._put_aside(pack.path, "a pack that could not be poured")

    def _check_parent(self, pack: Pack, parent: str) -> None:
        # A disk is only right on top of the very one it was written on. One made again by the same recipe has the same key, other content.
        try:
            same = self.checked(parent).seal == pack.manifest.parent_seal
        except (FileNotFoundError, PackCorrupt):
            same = False
        if not same:
            raise PackCorrupt(f"the pack {pack.key[:12]} ({pack.manifest.name}) stands on a pack that is gone or was made again")
