"""Options of the service, and its token."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import secrets
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import attrs

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.files import atomic_file, private_dir

__all__ = ["TOKEN_FILE", "Options", "is_loopback", "made_token", "read_token"]

TOKEN_FILE = "serve.token"  # noqa: S105 - the name of a file
"""File in the catalog for a token that the service made itself."""
_BITS = 128
_BYTES = 32
_VARIETY = 8
"""Different characters that a random token of this length has at least, but for one in many millions."""
# Those of RFC 6750 that a WebSocket's subprotocol may have too (RFC 9110, token): browsers can send it nowhere else.
_TOKEN = re.compile(r"[A-Za-z0-9._~+-]{1,512}")
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")


@attrs.frozen(kw_only=True)
class Options:
    """Settings of the service itself.

    Attributes:
        root: The catalog's folder.
        token: The bearer token; it is not shown.
        host: The address to listen on.
        port: The TCP port; 0 for a free one.
        node: The name of this computer in answers.
        folder: The folder of the project, whose images can be named.
        settings: Settings by their names, for machines that it starts.
        allowed_hosts: Names beside this computer's own that a request's `Host` may have.
        behind_proxy: Whether a proxy that speaks TLS passes requests on, and adds the client's address to `X-Forwarded-For`.
        certificate: The TLS certificate, with its chain; None for plain HTTP.
        key: Its private key; None if it is in the same file.
        max_upload: Bytes of a body at most.
        max_starts: Machines that start at the same time; further ones wait.
        max_machines: Machines in the catalog up to which new ones are accepted.
    """

    root: Path
    token: str = attrs.field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8080
    node: str = attrs.field(factory=socket.gethostname)
    folder: Path = attrs.field(factory=Path.cwd)
    settings: Mapping[str, str] = attrs.field(factory=dict)
    allowed_hosts: tuple[str, ...] = ()
    behind_proxy: bool = False
    certificate: Path | None = None
    key: Path | None = None
    max_upload: int = 1 << 30
    max_starts: int = 4
    max_machines: int = 200

    def __attrs_post_init__(self) -> None:
        """Refuse to send tokens through a network where everybody can read them."""
        if not is_loopback(self.host) and self.certificate is None and not self.behind_proxy:
            raise SpecError(
                f"--host {self.host} can be reached from other computers: give a certificate (--tls-cert FILE --tls-key FILE), or say "
                "--behind-proxy if a proxy speaks TLS"
            )
        if self.key is not None and self.certificate is None:
            raise SpecError("--tls-key takes --tls-cert too")


def is_loopback(host: str) -> bool:
    """Tell whether an address or name means this computer alone."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    # RFC 6761: such names never leave this computer.
    return host == "localhost" or host.endswith(".localhost")


def read_token(path: Path) -> str:
    """Read the token in a file.

    Raises:
        SpecError: Others can read the file, or the token can be guessed.
        OSError: It cannot be read.
    """
    # Opened once, so that what is checked is what is read.
    with path.open("rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise SpecError(f"--token-file {path}: it is no file")
        if about.st_mode & 0o077 or about.st_uid not in (0, os.geteuid()):
            raise SpecError(f"--token-file {path}: others may read or replace it; run: chmod 600 {path}")
        text = file.read(4096).decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(text):
        raise SpecError(f"--token-file {path}: takes one line of letters, digits, and . _ ~ + -; make one with: openssl rand -hex {_BYTES}")
    bits = len(text) * (4 if _HEX.fullmatch(text) else math.log2(64))
    if bits < _BITS or len(set(text)) < _VARIETY:
        raise SpecError(f"--token-file {path}: the token has less than {_BITS} bits; make one with: openssl rand -hex {_BYTES}")
    return text


def made_token(root: Path) -> Path:
    """Return the file of the catalog's own token, made if it is not there."""
    path = private_dir(root) / TOKEN_FILE
    if not path.exists():
        with atomic_file(path) as file:
            file.write(f"{secrets.token_hex(_BYTES)}\n".encode())
    return path
