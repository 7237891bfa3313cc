"""Files in compressed pieces: without holes, and as a difference where a similar file is there.

A piece covers 4 MiB of a file, and has those of its blocks of 64 KiB that are not all zeros. Where the same part of another file is known
to both sides, it is compressed as what differs from that (as `zstd --patch-from` does): the RAM of a machine is mostly that of the one that
it was cloned from.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.files import BLOCK, blocks

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LARGEST_BLOB", "PIECE", "Piece", "join", "split"]

PIECE = 4 << 20
LARGEST_BLOB = PIECE + (64 << 10)
"""Most bytes of a compressed piece: what cannot be compressed gets a little longer."""
_PER_PIECE = PIECE // BLOCK
_SHA256 = r"[0-9a-f]{64}"
# Matches are looked for in all of the other file's piece, which lies before this one in the window.
_OPTIONS: dict[int, int] = {
    zstd.CompressionParameter.compression_level: 3,
    zstd.CompressionParameter.window_log: 23,
    zstd.CompressionParameter.enable_long_distance_matching: 1,
}
_WINDOW: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 23}


@attrs.frozen(kw_only=True)
class Piece:
    """A part of a file that is not all zeros.

    Attributes:
        number: Its place: it begins at so many times `PIECE`.
        blocks: Which of its blocks it has, as bits, the lowest one for the first block.
        sha256: The digest of these blocks in a row.
        blob: The digest of them compressed.
        differs: Whether that needs the same part of another file.
    """

    number: int = attrs.field(validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)])
    blocks: int = attrs.field(validator=[attrs.validators.instance_of(int), attrs.validators.gt(0), attrs.validators.lt(1 << _PER_PIECE)])
    sha256: str = attrs.field(validator=attrs.validators.matches_re(_SHA256))
    blob: str = attrs.field(validator=attrs.validators.matches_re(_SHA256))
    differs: bool = attrs.field(validator=attrs.validators.instance_of(bool))

    @property
    def places(self) -> list[int]:
        """Return where its blocks are in the file."""
        return [self.number * PIECE + bit * BLOCK for bit in range(_PER_PIECE) if self.blocks >> bit & 1]


def split(path: Path, base: Path | None) -> Iterator[tuple[Piece, bytes]]:
    """Yield the pieces of a file, each with its compressed content.

    Args:
        path: The file.
        base: A similar file that both sides have.
    """
    with path.open("rb", buffering=0) as file:
        found = blocks(file.fileno(), os.fstat(file.fileno()).st_size)
        for number, part in groupby(found, key=lambda block: block[0] // PIECE):
            there = list(part)
            mask = sum(1 << offset % PIECE // BLOCK for offset, _ in there)
            content = b"".join(data for _, data in there)
            known = _known(base, number)
            blob = _compress(content, known)
            yield Piece(number=number, blocks=mask, sha256=_sha256(content), blob=_sha256(blob), differs=bool(known)), blob


def join(path: Path, size: int, pieces: Iterator[Piece] | list[Piece], *, fetch: Callable[[str], bytes], base: Path | None) -> None:
    """Write a file from its pieces, with holes instead of zeros, and sync it.

    Args:
        path: The file, which must not exist.
        size: Its bytes.
        pieces: Its pieces.
        fetch: Function that returns the compressed content of a digest; it need not be right.
        base: The similar file.

    Raises:
        CatalogError: A piece is damaged, or lies outside of the file.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        for piece in pieces:
            lengths = [min(BLOCK, size - place) for place in piece.places]
            if min(lengths) <= 0:
                raise CatalogError(f"a piece of {path.name} lies outside of the file")
            content = _content(piece, fetch(piece.blob), sum(lengths), base)
            done = 0
            for place, length in zip(piece.places, lengths, strict=True):
                os.pwrite(fd, content[done : done + length], place)
                done += length
        os.fsync(fd)
    finally:
        os.close(fd)


def _content(piece: Piece, blob: bytes, length: int, base: Path | None) -> bytes:
    if _sha256(blob) != piece.blob:
        raise CatalogError(f"the content {piece.blob[:12]} is damaged")
    known = _known(base, piece.number) if piece.differs else b""
    try:
        decompressor = zstd.ZstdDecompressor(zstd_dict=_prefix(known) if known else None, options=_WINDOW)
        # One byte more than expected, and no more, however much there is.
        content = decompressor.decompress(blob, length + 1)
    except zstd.ZstdError as error:
        raise CatalogError(f"the content {piece.blob[:12]} cannot be decompressed: {error}") from error
    if len(content) != length or _sha256(content) != piece.sha256:
        raise CatalogError(f"the content {piece.blob[:12]} is not that of its piece")
    return content


def _known(base: Path | None, number: int) -> bytes:
    """Return what another file has at the place of a piece; nothing if that is all zeros, or there is none."""
    if base is None:
        return b""
    with base.open("rb", buffering=0) as file:
        part = os.pread(file.fileno(), PIECE, number * PIECE)
    return part if part.strip(b"\0") else b""


def _compress(content: bytes, known: bytes) -> bytes:
    compressor = zstd.ZstdCompressor(options=_OPTIONS, zstd_dict=_prefix(known) if known else None)
    return compressor.compress(content, zstd.ZstdCompressor.FLUSH_FRAME)


def _prefix(known: bytes) -> tuple[zstd.ZstdDict, int]:
    return zstd.ZstdDict(known, is_raw=True).as_prefix


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
