"""The seed of a machine: an ISO that cloud-init's NoCloud source reads."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import Any

import pycdlib
import pytest
import yaml

from pytest_vmbottle import SpecError
from pytest_vmbottle.backend import GUEST_MAC, Keys
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.seed import write_seed


@pytest.fixture(scope="module")
def keys() -> Keys:
    return new_keys()


def contents(path: Path) -> dict[str, str]:
    """The files of an ISO by the names that Linux shows, read with their Rock Ridge and again with their Joliet names."""
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    try:
        by_rock, by_joliet = (
            {name: read(iso, **{f"{kind}_path": f"/{name}"}) for name in ("user-data", "meta-data", "network-config")}
            for kind in ("rr", "joliet")
        )
        assert by_rock == by_joliet
        assert iso.pvd.volume_identifier.strip() == b"cidata"
        return by_rock
    finally:
        iso.close()


def read(iso: Any, **path: str) -> str:
    sink = io.BytesIO()
    iso.get_file_from_iso_fp(sink, **path)
    return sink.getvalue().decode()


def test_a_seed_carries_the_machines_name_and_keys_and_is_private(tmp_path: Path, keys: Keys) -> None:
    write_seed(tmp_path / "seed.iso", hostname="db", keys=keys)
    files = contents(tmp_path / "seed.iso")
    user = yaml.safe_load(files["user-data"])

    assert stat.S_IMODE((tmp_path / "seed.iso").stat().st_mode) == 0o600
    assert files["user-data"].startswith("#cloud-config\n")
    assert user["hostname"] == "db"
    assert user["ssh_keys"] == {"ed25519_private": keys.host_private, "ed25519_public": keys.host_public}
    assert user["ssh_authorized_keys"] == [keys.user_public]
    assert user["ssh_pwauth"] is False
    assert user["disable_root"] is False
    assert "users" not in user, "root's password would be locked, and Alpine's sshd lets nobody in whose is"
    assert keys.user_private not in files["user-data"]
    assert yaml.safe_load(files["meta-data"])["local-hostname"] == "db"
    assert yaml.safe_load(files["network-config"])["ethernets"]["nic"] == {"match": {"macaddress": GUEST_MAC}, "dhcp4": True}


@pytest.mark.parametrize(
    "data", ["#cloud-config\npackage_update: true\nhostname: mine\n", '#cloud-config\n{"package_update": true, "hostname": "mine"}']
)
def test_what_the_user_adds_wins_and_the_rest_of_ours_stays(tmp_path: Path, keys: Keys, data: str) -> None:
    write_seed(tmp_path / "seed.iso", hostname="db", keys=keys, user_data=data)
    user = yaml.safe_load(contents(tmp_path / "seed.iso")["user-data"])

    assert (user["hostname"], user["package_update"]) == ("mine", True)
    assert user["ssh_keys"]["ed25519_private"] == keys.host_private


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("#cloud-config\na: [1", "user_data is not valid YAML"),
        ("#cloud-config\n\ta: 1", "user_data is not valid YAML"),
        ("#cloud-config\n!!python/object/apply:os.system [touch evil]", "user_data is not valid YAML"),
        ("#cloud-config\n- a\n", "user_data must be a mapping at its top level"),
        ("#cloud-config\n", "user_data must be a mapping at its top level"),
    ],
)
def test_user_data_that_is_no_mapping_is_refused_and_leaves_no_seed(tmp_path: Path, keys: Keys, data: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        write_seed(tmp_path / "seed.iso", hostname="db", keys=keys, user_data=data)

    assert list(tmp_path.iterdir()) == []


def test_keys_are_new_each_time_and_are_not_shown(keys: Keys) -> None:
    other = new_keys()

    assert len({keys.user_private, keys.host_private, other.user_private, other.host_private}) == 4
    assert keys.host_public.startswith("ssh-ed25519 ")
    assert "PRIVATE" not in repr(keys)
