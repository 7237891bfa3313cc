"""Signatures of files as `minisign` makes them: by Ed25519, of the BLAKE2b-512 of the content, in a small file beside the signed one.

::

    untrusted comment: whatever
    base64 of b"ED", the key's number, and the signature of the digest
    trusted comment: whatever
    base64 of the signature of both, the signature above and the trusted comment
"""

from __future__ import annotations

import base64
import hashlib
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader

__all__ = ["PublicKey", "SecretKey", "signature_of"]

_ED25519, _HASHED = b"Ed", b"ED"
_UNLOCKED, _SCRYPT = bytes(2), b"Sc"
_PUBLIC, _SIGNATURE, _WHOLE = "<2s8s32s", "<2s8s64s", "<64s"
_SECRET = "<2s2s2s32sQQ104s"  # noqa: S105 # a layout, as the others are
_HALVES = "<8s32s32s32x"
"""Part of a secret key that may be locked: its number, its two halves, and a checksum, which is nought in keys without a password."""
_TRUSTED = b"trusted comment: "
_LARGEST = 16 << 10
"""Bytes of a file of minisign at most; it allows 8 KiB for a trusted comment."""


def signature_of(path: Path) -> Path:
    """Return where the signature of a file lies."""
    return path.with_name(f"{path.name}.minisig")


@attrs.frozen
class PublicKey:
    """Key that tells whose a signature is.

    Attributes:
        number: A number that tells keys apart, which proves nothing.
        point: The key itself.
    """

    number: bytes
    point: bytes

    @classmethod
    def read(cls, text: str) -> Self:
        """Read a key as minisign prints it, or the file of one.

        >>> PublicKey.read("RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3").name
        'E7620F1842B4E81F'

        Raises:
            CatalogError: It is neither.
        """
        refusal = f"{printable(text)[:200]!r} is neither a public key of minisign (56 characters, the first ones RW) nor a file of one"
        line = _lines(Path(text))[-1] if Path(text).is_file() else text.encode(errors="replace")
        algorithm, number, point = _unpack(_PUBLIC, line, refusal)
        if algorithm != _ED25519:
            raise CatalogError(refusal)
        return cls(number, point)

    @property
    def name(self) -> str:
        """The key's number as minisign shows it."""
        return f"{int.from_bytes(self.number, 'little'):X}"

    def check(self, file: BufferedReader, path: Path) -> str:
        """Check the signature that lies beside a file, and return its trusted comment.

        Args:
            file: The file, open for reading.
            path: Its path.

        Raises:
            CatalogError: There is no signature, it is another key's, or the file or the trusted comment is not what was signed.
        """
        where = signature_of(path)
        try:
            number, signature, comment, whole = _signature(where)
        except OSError as error:
            raise CatalogError(f"{path} is not signed: cannot read {where.name} beside it: {error.strerror}") from error
        if number != self.number:
            raise CatalogError(f"{path} was signed with the key {PublicKey(number, b'').name}, and not with {self.name}")
        if not self._has_signed(_digest(file), signature):
            raise CatalogError(f"{path} is not the file that was signed: it was changed, or {where.name} is of another file")
        if not self._has_signed(signature + comment, whole):
            raise CatalogError(f"{where}: its trusted comment is not the one that was signed")
        return printable(comment.decode(errors="replace"))

    def _has_signed(self, data: bytes, signature: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(self.point).verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return True


@attrs.frozen(repr=False)
class SecretKey:
    """Key that signs.

    Attributes:
        number: Number of its public key.
        key: The key itself.
    """

    number: bytes
    key: Ed25519PrivateKey

    @classmethod
    def read(cls, path: Path, password: Callable[[], str]) -> Self:
        """Read a key of minisign.

        Args:
            path: Its file.
            password: Function that returns the key's password; called only if it has one.

        Raises:
            CatalogError: It is none, or the password is wrong.
        """
        refusal = f"{path} is no secret key of minisign, or is damaged"
        algorithm, lock, _, salt, operations, memory, halves = _unpack(_SECRET, _lines(path)[-1], refusal)
        if algorithm != _ED25519 or lock not in (_UNLOCKED, _SCRYPT):
            raise CatalogError(refusal)
        if lock == _SCRYPT:
            refusal = f"{path}: the password is wrong"
            halves = _unlock(halves, password(), salt, operations, memory)
        number, seed, point = struct.unpack(_HALVES, halves)
        key = Ed25519PrivateKey.from_private_bytes(seed)
        if key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) != point:
            raise CatalogError(refusal)
        return cls(number, key)

    def sign(self, path: Path) -> Path:
        """Sign a file, and return the file of the signature, which lies beside it."""
        with path.open("rb") as file:
            signature = self.key.sign(_digest(file))
        # In minisign's own words. A file's name may have any bytes, but a comment is one line.
        name = " ".join(printable(path.name).split())
        comment = f"timestamp:{time.time():.0f}\tfile:{name}\thashed".encode()
        lines = (
            b"untrusted comment: signature of a file of pytest-vmbottle",
            base64.b64encode(_HASHED + self.number + signature),
            _TRUSTED + comment,
            base64.b64encode(self.key.sign(signature + comment)),
        )
        where = signature_of(path)
        with atomic_file(where, mode=0o644) as file:
            file.write(b"\n".join((*lines, b"")))
        return where


def _signature(path: Path) -> tuple[bytes, bytes, bytes, bytes]:
    """Read a signature: the key's number, the signature of the digest, the trusted comment, and the signature of both."""
    refusal = f"{path} is no signature of minisign, or is damaged"
    _, first, comment, second, *more = [*_lines(path), b"", b"", b"", b""]
    algorithm, number, signature = _unpack(_SIGNATURE, first, refusal)
    (whole,) = _unpack(_WHOLE, second, refusal)
    if algorithm == _ED25519:
        raise CatalogError(f"{path} is a signature as minisign made them before 0.10: sign the file again, with -H")
    if algorithm != _HASHED or not comment.startswith(_TRUSTED) or any(more):
        raise CatalogError(refusal)
    return number, signature, comment.removeprefix(_TRUSTED), whole


def _lines(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return [line.rstrip(b"\r") for line in file.read(_LARGEST).removesuffix(b"\n").split(b"\n")]


def _unpack(layout: str, line: bytes, refusal: str) -> tuple[Any, ...]:
    try:
        return struct.unpack(layout, base64.b64decode(line, validate=True))
    except (ValueError, struct.error) as error:
        raise CatalogError(refusal) from error


def _digest(file: BufferedReader) -> bytes:
    file.seek(0)
    return hashlib.file_digest(file, "blake2b").digest()


def _unlock(locked: bytes, password: str, salt: bytes, operations: int, memory: int) -> bytes:
    """Return what a password has locked, by the noise that scrypt makes of it.

    The parameters follow from the limits as libsodium has it (crypto_pwhash_scryptsalsa208sha256).
    """
    operations = max(operations, 1 << 15)
    block = 8
    cost = 1 << max(2, min(operations // 32, memory // (128 * block))).bit_length() - 1
    lanes = max(1, operations // 32 // cost)
    most = 128 * block * (cost + lanes + 2)
    try:
        noise = hashlib.scrypt(password.encode(), salt=salt, n=cost, r=block, p=lanes, maxmem=most, dklen=len(locked))
    except (ValueError, OverflowError, MemoryError) as error:
        raise CatalogError(f"the key's password cannot be tried: {error}") from error
    return bytes(one ^ other for one, other in zip(locked, noise, strict=True))
