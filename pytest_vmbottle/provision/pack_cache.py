"""Cache of verified packs, held as long as they may be needed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.errors import PackCorrupt

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.provision.context import Context

__all__ = ["PackCache"]


class PackCache:
    """The packs of a catalog that this process has verified."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._usable: dict[str, tuple[object, Pack]] = {}
        self._counted: set[str] = set()

    def get(self, key: str) -> Pack | None:
        """Return the pack of this key if it exists and is recent enough, or None.

        A damaged one may be in the making again: only the holder of its lock judges it.

        Raises:
            PackCorrupt: The pack is damaged.
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

    def get_or_quarantine(self, key: str) -> Pack | None:
        """Return the pack as `get` does, and move a damaged one out of the way.

        The caller holds the pack's lock.
        """
        try:
            return self.get(key)
        except PackCorrupt as error:
            with suppress(OSError):
                aside = self._quarantine(self._context.catalog.pack(key), "a damaged pack")
                where = f"it was moved to {aside} and" if aside else "it stays until others have stopped using it, and"
                self._context.settings.warn(f"{error}; {where} is built again")
            return None

    def _quarantine(self, folder: Path, why: str) -> Path | None:
        """Move a pack out of the way, unless somebody else holds it: then it stays until it is released."""
        # Our own hold would keep the folder from being moved.
        self._context.holds.release(folder)
        aside = self._context.catalog.quarantine(folder)
        if aside is not None:
            self._context.catalog.ledger.keep(aside, why)
        return aside

    def checked(self, key: str) -> Pack:
        """Return the verified pack of this key, with the very packs below it that it was made on.

        It is read in full the first time, later only its files' status is checked.

        Raises:
            FileNotFoundError: There is no such pack.
            PackCorrupt: Its files, or those of a pack below it, have changed.
        """
        known = self._usable.pop(key, None)
        with suppress(PackCorrupt):  # made anew meanwhile, perhaps
            if known is not None and known[0] == known[1].stamp():
                self._usable[key] = known
                return known[1]
        # Held before it is read, so that nobody removes it in the middle.
        pack = packs.read(self._taken_up(key))
        pack.verify()
        if pack.manifest.parent is not None:
            self._check_parent(pack, pack.manifest.parent)
        pack.note_use()
        self._usable[key] = (pack.stamp(), pack)
        return pack

    def used(self, key: str) -> Pack | None:
        """Return the pack of this key if it was verified before, and has not changed since."""
        known = self._usable.get(key)
        with suppress(PackCorrupt):
            return known[1] if known is not None and known[0] == known[1].stamp() else None
        return None

    def _taken_up(self, key: str) -> Path:
        """Hold the folder of a pack and return its path.

        Another process may replace the pack at the same time.
        """
        while True:
            folder = self._context.catalog.pack(key)
            try:
                self._context.holds.take(folder)
            except FileNotFoundError:
                # The same folder twice: it is really gone. Another one: it was replaced just then, so the new one is taken.
                if self._context.catalog.pack(key) == folder:
                    raise
            else:
                return folder

    def made(self, key: str) -> Pack:
        """Return the pack of this key, which was made a moment ago."""
        self._counted.add(key)
        self._context.tally.built += 1
        return self.checked(key)

    def pulled(self, key: str) -> Pack:
        """Return the pack of this key, which came from a registry a moment ago."""
        self._counted.add(key)
        self._context.tally.pulled += 1
        return self.checked(key)

    def quarantine(self, pack: Pack) -> None:
        """Quarantine a pack that could not be restored."""
        self._usable.pop(pack.key, None)
        with suppress(OSError):
            self._quarantine(pack.path, "a pack that could not be restored")

    def _check_parent(self, pack: Pack, parent: str) -> None:
        # A disk is only right on top of the very one it was written on. One made again by the same recipe has the same key, other content.
        try:
            same = self.checked(parent).seal == pack.manifest.parent_seal
        except (FileNotFoundError, PackCorrupt):
            same = False
        if not same:
            raise PackCorrupt(f"the pack {pack.key[:12]} ({pack.manifest.name}) depends on a pack that is gone or was built again")
