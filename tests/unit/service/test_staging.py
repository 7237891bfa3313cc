"""Files that a client uploads: nothing leads out of their folder."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import SpecError
from pytest_vmbottle.service.schema import UploadedFile
from pytest_vmbottle.service.staging import fill, spooled, staging


@contextmanager
def staged(files: list[UploadedFile]) -> Iterator[tuple[Path, int]]:
    with staging() as folder:
        yield folder, fill(folder, files)


def file(path: str, **content: Any) -> UploadedFile:
    return UploadedFile(path=path, **(content or {"text": "x"}))


def test_files_have_their_contents_and_modes_whatever_the_umask_is() -> None:
    before = os.umask(0o077)
    try:
        files = [file("a/run", text="é", mode="0750"), file("a/b/data", content_b64="AP8=", mode=0o600), file("plain", text="")]
        with staged(files) as (folder, size):
            found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
            modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in found.items()}
            contents = {name: path.read_bytes() for name, path in found.items() if path.is_file()}
    finally:
        os.umask(before)

    assert contents == {"a/run": "é".encode(), "a/b/data": b"\0\xff", "plain": b""}
    assert modes == {"a": 0o755, "a/b": 0o755, "a/run": 0o750, "a/b/data": 0o600, "plain": 0o644}
    assert size == 4
    assert not folder.exists()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a/", ".", "..", "a\0b", "/".join("a" * 65), "n" * 300]
)
def test_a_path_that_leads_out_or_names_no_file_is_refused(path: str) -> None:
    with pytest.raises(SpecError, match="path="), staged([file("good"), file(path)]):
        pytest.fail("it was accepted")


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_two_files_cannot_have_one_path(paths: tuple[str, str]) -> None:
    with pytest.raises(SpecError, match="another file"), staged([file(path) for path in paths]):
        pytest.fail("they were accepted")


@pytest.mark.parametrize("text", ["A", "A===", "é", "AA==\n", "!!!!"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="base64"), staged([file("a", content_b64=text)]):
        pytest.fail("it was accepted")


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_whatever_the_paths_are_nothing_is_made_outside_the_folder(paths: list[str]) -> None:
    outside = set(Path.cwd().parent.iterdir())
    try:
        with staged([UploadedFile.model_construct(path=path, text="x", content_b64=None, mode=None) for path in paths]) as (folder, _):
            made = [path for path in folder.rglob("*") if path.is_file()]
            assert sorted(str(path.relative_to(folder)) for path in made) == sorted(paths)
    except (SpecError, UnicodeEncodeError):
        pass
    assert set(Path.cwd().parent.iterdir()) == outside


def test_a_body_is_there_when_all_of_it_has_come_and_nothing_is_left_if_it_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def body(*pieces: bytes, broken: bool = False) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if broken:
            raise ConnectionError("the client hung up")

    async def take(pieces: AsyncIterator[bytes]) -> bytes:
        async with spooled(pieces) as came:
            return came.read_bytes()

    assert asyncio.run(take(body(b"one", b"two"))) == b"onetwo"
    with pytest.raises(ConnectionError):
        asyncio.run(take(body(b"one", broken=True)))
    assert list(tmp_path.iterdir()) == []
