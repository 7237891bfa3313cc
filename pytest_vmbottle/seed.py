"""The cloud-init seed of a machine: a NoCloud ISO with its identity, its keys, and the user's own cloud-config.

Format: https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pycdlib
import yaml

from pytest_vmbottle.backend import GUEST_MAC, Keys
from pytest_vmbottle.errors import SpecError

__all__ = ["write_seed"]

# Everything a guest does not need in order to be reached is left to the image. By its address the card is found whoever sets it up: only
# netplan and networkd know patterns for names, others would look for a card of the name that stands here (cloudinit/net/network_state.py).
_NETWORK = {"version": 2, "ethernets": {"nic": {"match": {"macaddress": GUEST_MAC}, "dhcp4": True}}}


def write_seed(path: Path, *, hostname: str, keys: Keys, user_data: str | None = None) -> None:
    """Writes the ISO.

    Args:
        path: Where; only this user can read it.
        hostname: The guest's name, which also names the instance to cloud-init.
        keys: What it is to let us in with, and to identify itself by.
        user_data: A cloud-config document whose keys are added to ours and win over them.

    Raises:
        SpecError: `user_data` is not valid YAML, or not a mapping.
    """
    config = {**_ours(hostname, keys), **_theirs(user_data)}
    files = {
        "user-data": "#cloud-config\n" + yaml.safe_dump(config, sort_keys=False),
        "meta-data": yaml.safe_dump({"instance-id": f"vmbottle-{hostname}", "local-hostname": hostname}),
        "network-config": yaml.safe_dump(_NETWORK, sort_keys=False),
    }
    path.touch(mode=0o600)
    _write_iso(path, {name: text.encode() for name, text in files.items()})


def _ours(hostname: str, keys: Keys) -> dict[str, object]:
    return {
        "hostname": hostname,
        "disable_root": False,
        "ssh_pwauth": False,
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": keys.host_private, "ed25519_public": keys.host_public},
        # For root too, since it is not disabled. Named among the `users`, root would get its password locked, and an sshd without PAM, as
        # Alpine's, lets nobody in whose password is (cloudinit/config/cc_ssh.py, cloudinit/distros/__init__.py).
        "ssh_authorized_keys": [keys.user_public],
    }


def _theirs(user_data: str | None) -> dict[str, object]:
    if user_data is None:
        return {}
    try:
        config = yaml.safe_load(user_data)
    except yaml.YAMLError as error:
        raise SpecError(f"user_data is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise SpecError("user_data must be a mapping at its top level")
    return config


def _write_iso(path: Path, files: dict[str, bytes]) -> None:
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for name, content in files.items():
        plain = name.upper().replace("-", "_") + ".;1"
        iso.add_fp(BytesIO(content), len(content), f"/{plain}", rr_name=name, joliet_path=f"/{name}")
    with path.open("wb") as file:
        iso.write_fp(file)
    iso.close()
