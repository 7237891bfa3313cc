"""Seed of a machine: an ISO for cloud-init's NoCloud source, with name, keys and the user's own user-data.

Name and keys are there once more as plain files, for images that read them faster than cloud-init does.

Format: https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html and, of the user-data,
https://cloudinit.readthedocs.io/en/latest/explanation/format.html
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from email import message_from_bytes
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from io import BytesIO
from typing import TYPE_CHECKING, Any

import pycdlib
import yaml

from pytest_vmbottle.backends.port import GUEST_MAC
from pytest_vmbottle.channels.port import Keys
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.spec import POWER_IN_FIRST_BOOT, ends_first_boot, script_ends_first_boot

if TYPE_CHECKING:
    from email.message import Message
    from pathlib import Path

__all__ = ["write_seed"]

_HEADER = b"#cloud-config\n"
# Everything a guest does not need in order to be reached is left to the image. By its address the card is found whoever sets it up: only
# netplan and networkd know patterns for names, others would look for a card of the name that stands here (cloudinit/net/network_state.py).
_NETWORK = {"version": 2, "ethernets": {"nic": {"match": {"macaddress": GUEST_MAC}, "dhcp4": True}}}


def write_seed(path: Path, *, hostname: str, keys: Keys, user_data: str | None = None) -> None:
    """Write the seed as an ISO image.

    Args:
        path: Path of the ISO, which only this user can read.
        hostname: The guest's name, which also names the instance to cloud-init.
        keys: Our key for the login, and the guest's host key.
        user_data: The user's own user-data for cloud-init. It takes precedence over ours, except for our login.

    Raises:
        SpecError: The user-data is invalid, or would end the first boot.
    """
    files = {
        "user-data": _user_data(hostname, keys, user_data),
        "meta-data": _dump({"instance-id": f"vmbottle-{hostname}", "local-hostname": hostname}),
        "network-config": _dump(_NETWORK),
        "hostname": f"{hostname}\n".encode(),
        "authorized-keys": _line(keys.user_public),
        "host-key": _line(keys.host_private),
        "host-key-public": _line(keys.host_public),
    }
    # Made private before there is a key in it.
    path.touch(mode=0o600)
    _write_iso(path, files)


def _user_data(hostname: str, keys: Keys, theirs: str | None) -> bytes:
    ours: dict[str, object] = {"hostname": hostname, "ssh_pwauth": False, "ssh_deletekeys": True}
    if theirs is None or _is_config(theirs):
        config = _read_config(theirs) if theirs is not None else {}
        return _HEADER + _dump(_opened({**ours, **config}, keys))
    message = MIMEMultipart()
    # Parts are merged in their order: a later one wins, but for lists that are said to be appended to (cloudinit/handlers/cloud_config.py).
    opened = _opened({}, keys)
    append = {"ssh_authorized_keys": opened.pop("ssh_authorized_keys"), "merge_how": "list(append)+dict(no_replace,recurse_list)+str()"}
    for part in (_part(_HEADER + _dump(ours)), _checked_part(theirs), *(_part(_HEADER + _dump(each)) for each in (opened, append))):
        message.attach(part)
    return message.as_bytes()


def _opened(config: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """Return a cloud-config that allows our login as root, whatever else it says."""
    own = {"ed25519_private": keys.host_private, "ed25519_public": keys.host_public}
    named = _as_list(config.get("ssh_authorized_keys"))
    host_keys = config.get("ssh_keys") or {}
    if not isinstance(host_keys, dict):
        raise SpecError("user_data: ssh_keys must be a mapping of kinds of keys to keys")
    opened = {
        **config,
        "disable_root": False,
        "ssh_keys": {**host_keys, **own},
        # For root too, since it is not disabled. Named among the `users`, root would get its password locked, and an sshd without PAM, as
        # Alpine's, lets nobody in whose password is (cloudinit/config/cc_ssh.py, cloudinit/distros/__init__.py).
        "ssh_authorized_keys": [*named, keys.user_public],
    }
    if "user" in config:
        opened["user"] = _unlocked(config["user"])
    if "users" in config:
        users = config["users"]
        opened["users"] = _unlocked(re.split(r"\s*,\s*", users) if isinstance(users, str) else users)
    passwords = config.get("chpasswd")
    if isinstance(passwords, dict) and re.search(r"\broot\b", str(passwords)):
        opened["chpasswd"] = {**passwords, "expire": False}  # whose password has expired cannot run anything until it is changed
    return opened


def _unlocked(users: object) -> object:
    """Return the users of a cloud-config, with a root who can log in."""
    if isinstance(users, list):
        return [_unlocked(each) for each in users]
    if users == "root":
        users = {"name": "root"}
    if not isinstance(users, dict):
        return users
    if isinstance(users.get("root"), dict):  # by their names
        return {**users, "root": _without_lock(users["root"])}
    return _without_lock(users) if users.get("name") == "root" else users


def _without_lock(user: dict[str, Any]) -> dict[str, Any]:
    # With `ssh_redirect_user` a login would only be told to use another user.
    return {key: value for key, value in user.items() if key != "ssh_redirect_user"} | {"lock_passwd": False}


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_config(text: str) -> bool:
    """Tell whether user-data is a cloud-config rather than another kind."""
    # cloud-init ignores the case of letters too, and takes the longer words for other kinds (cloudinit/handlers/__init__.py).
    return re.match(r"#cloud-config(?!-archive|-jsonp)", text, re.IGNORECASE) is not None


def _read_config(text: str) -> dict[str, Any]:
    config = _read_yaml(text)
    if not isinstance(config, dict):
        raise SpecError("user_data must be a mapping at its top level")
    # A guest that powers itself off in its first boot would look like one that crashed.
    _refuse_power(ends_first_boot(config))
    return config


def _read_yaml(text: str) -> object:
    try:
        with suppress(ValueError):  # YAML's reader takes the JSON of characters beyond 16 bits for two each
            return json.loads(text.partition("\n")[2])
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"user_data is not valid YAML: {error}") from error
    except RecursionError:
        raise SpecError("user_data is nested too deeply") from None


def _checked_part(text: str) -> Message:
    """Return the user's user-data as a part of ours, if it leaves the guest running."""
    if not text.startswith("#"):
        message = message_from_bytes(text.encode())
        for part in message.walk():
            content = part.get_payload(decode=True)
            if isinstance(content, bytes):
                text = content.decode(errors="replace")
                _check(text)
                if part.get_content_maintype() == "text":  # cloud-init would read characters beyond ASCII wrongly, as they are
                    del part["Content-Transfer-Encoding"]
                    part.set_payload(text, "utf-8")
        return message
    _check(text)
    return _part(text.encode())


def _check(text: str) -> None:
    if _is_config(text):
        _read_config(text)
    elif text.lower().startswith("#cloud-config-archive"):
        for entry in _as_list(_read_yaml(text)):
            content = entry.get("content") if isinstance(entry, dict) else entry
            _check(content if isinstance(content, str) else "")
    elif text.startswith(("#!", "#cloud-boothook", "##")) and script_ends_first_boot(text):
        _refuse_power(text.partition("\n")[0])


def _refuse_power(found: str) -> None:
    if found:
        raise SpecError(f"user_data={found!r}: {POWER_IN_FIRST_BOOT}")


def _part(content: bytes) -> Message:
    return MIMEText(content.decode(), _charset="utf-8")  # its first line says what it is


def _dump(value: object) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()


def _line(text: str) -> bytes:
    return f"{text.rstrip()}\n".encode()


def _write_iso(path: Path, files: dict[str, bytes]) -> None:
    iso = pycdlib.PyCdlib()
    # Both extensions: Linux reads Rock Ridge, other systems may read Joliet, and plain ISO names lose case and hyphens.
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident="cidata")
    for name, content in files.items():
        plain = name.upper().replace("-", "_") + ".;1"
        iso.add_fp(BytesIO(content), len(content), f"/{plain}", rr_name=name, joliet_path=f"/{name}")
    with path.open("wb") as file:
        iso.write_fp(file)
    iso.close()
