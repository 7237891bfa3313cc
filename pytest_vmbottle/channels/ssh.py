"""Commands by SSH: for guests without the QEMU guest agent, for large data and for streams.

The guest's host key is pinned, nothing of the user's own SSH set-up (agent, keys, known hosts) is looked at, and every wait has a limit.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pytest_vmbottle.backend import Keys


def new_keys() -> Keys:
    """Fresh ed25519 keys for a machine and for us."""
    private, public = zip(_key_pair(), _key_pair(), strict=True)
    return Keys(user_private=private[0], user_public=public[0], host_private=private[1], host_public=public[1])


def _key_pair() -> tuple[str, str]:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private.decode(), public.decode()
