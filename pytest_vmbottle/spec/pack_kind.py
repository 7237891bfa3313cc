"""Kinds of packs."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["PackKind"]


class PackKind(StrEnum):
    """Kind of a pack, the quickest first.

    `TEMPLATE` is a running machine whose clones share the pack's RAM, `STREAM` a running machine whose RAM each clone reads from the pack,
    `DISK` a prepared disk that each clone boots.
    """

    TEMPLATE = "template"
    STREAM = "stream"
    DISK = "disk"

    @property
    def next(self) -> PackKind:
        """The kind to try next if this one does not work here."""
        # In the order of the definition. The last one has no next one, and stays.
        kinds = list(PackKind)
        return kinds[min(kinds.index(self) + 1, len(kinds) - 1)]
