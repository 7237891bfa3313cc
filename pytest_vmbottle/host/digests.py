"""Digests of values and of files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from pytest_vmbottle.host.files import blocks

__all__ = ["content_digest", "digest", "sparse_digest"]

_MANY_ZEROS = memoryview(bytes(1 << 20))


def content_digest(fd: int, tell: Callable[[int, int], object] = lambda _done, _size: None, *, algorithm: str = "sha256") -> str:
    """Return the digest of an open file's content, as sha256sum and the like print it.

    Holes count as zeros without being read.

    Args:
        fd: File descriptor to read.
        tell: Function that gets the bytes done and the bytes in total from time to time.
        algorithm: Name of the algorithm in hashlib.
    """
    value, done, size = hashlib.new(algorithm), 0, os.fstat(fd).st_size
    # The empty block at the end stands for a hole there, which `blocks` does not tell of.
    for offset, block in chain(blocks(fd, size), [(size, b"")]):
        while done < offset:
            zeros = _MANY_ZEROS[: offset - done]
            value.update(zeros)
            done += len(zeros)
            tell(done, size)
        value.update(block)
        done += len(block)
        tell(done, size)
    return value.hexdigest()


def sparse_digest(path: Path) -> str:
    """Return the sha256 of a file's length and of its 64 KiB blocks that are not all zeros, with their offsets.

    Equal contents give equal digests wherever the holes are, and holes cost no time: a machine's RAM is mostly holes.
    """
    value = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        length = os.fstat(file.fileno()).st_size
        for offset, block in blocks(file.fileno(), length):
            # An offset before each block: otherwise a block that moved would not change the digest.
            value.update(offset.to_bytes(8))
            value.update(block)
    value.update(length.to_bytes(8))
    return value.hexdigest()


def digest(*parts: object) -> str:
    """Return the hexadecimal sha256 of values that JSON can write, whatever the order of keys."""
    # Every option is given: packs are found by such a digest, and the same values written in another way would be another pack's.
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
