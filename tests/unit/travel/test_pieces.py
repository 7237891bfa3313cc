"""Files go to pieces and come back whole, with their holes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.files import size_on_disk
from pytest_vmbottle.travel.pieces import PIECE, Piece, join, split

WRITES = st.lists(st.tuples(st.integers(0, 3 * PIECE), st.binary(min_size=1, max_size=200)), max_size=6)


def sparse(path: Path, size: int, writes: list[tuple[int, bytes]]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in writes:
            os.pwrite(file.fileno(), data[: max(0, size - offset)], offset)
    return path


def there_and_back(path: Path, base: Path | None) -> tuple[list[Piece], Path]:
    blobs: dict[str, bytes] = {}
    pieces = []
    for piece, blob in split(path, base):
        pieces.append(piece)
        blobs[piece.blob] = blob
    back = path.with_name("back")
    back.unlink(missing_ok=True)
    join(back, path.stat().st_size, pieces, fetch=blobs.__getitem__, base=base)
    return pieces, back


@given(size=st.integers(0, 3 * PIECE), writes=WRITES, below=WRITES)
def test_any_file_comes_back_as_it_was_alone_and_as_a_difference(
    tmp_path_factory: pytest.TempPathFactory, size: int, writes: list[tuple[int, bytes]], below: list[tuple[int, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    path, base = sparse(folder / "file", size, writes), sparse(folder / "base", 2 * PIECE, below)
    for known in (None, base):
        _, back = there_and_back(path, known)
        assert back.read_bytes() == path.read_bytes()
        assert size_on_disk(back) <= size_on_disk(path) + (64 << 10) * len(writes)


def test_holes_take_neither_pieces_nor_room(tmp_path: Path) -> None:
    path = sparse(tmp_path / "file", 1 << 40, [(1 << 39, b"x")])
    (piece,), back = there_and_back(path, None)
    assert piece.number == (1 << 39) // PIECE
    assert (back.stat().st_size, size_on_disk(back) <= 128 << 10) == (1 << 40, True)


def test_what_is_like_the_file_below_takes_little_room(tmp_path: Path) -> None:
    data = os.urandom(PIECE)
    base = sparse(tmp_path / "base", PIECE, [(0, data)])
    path = sparse(tmp_path / "file", PIECE, [(0, data), (1_000_000, b"changed")])
    ((piece, blob),) = split(path, base)
    assert piece.differs
    assert len(blob) < 10_000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda blob: blob[:-1], "damaged"),
        (lambda blob: blob + b"x", "damaged"),
        (lambda blob: bytes([blob[0] ^ 1]) + blob[1:], "damaged"),
        (lambda _: b"", "damaged"),
    ],
)
def test_another_content_is_refused(tmp_path: Path, change: object, told: str) -> None:
    path = sparse(tmp_path / "file", PIECE, [(5, b"hello")])
    ((piece, blob),) = split(path, None)
    with pytest.raises(CatalogError, match=told):
        join(tmp_path / "back", PIECE, [piece], fetch=lambda _: change(blob), base=None)  # type: ignore[operator]


def test_a_piece_beyond_the_end_and_one_without_its_base_are_refused(tmp_path: Path) -> None:
    data = os.urandom(PIECE)
    path, base = sparse(tmp_path / "file", PIECE, [(0, data)]), sparse(tmp_path / "base", PIECE, [(0, data)])
    ((piece, blob),) = split(path, base)
    for size, known in ((0, base), (PIECE, None), (PIECE, sparse(tmp_path / "other", PIECE, [(0, os.urandom(PIECE))]))):
        with pytest.raises(CatalogError):
            join(tmp_path / f"back-{size}-{known and known.name}", size, [piece], fetch=lambda _: blob, base=known)
