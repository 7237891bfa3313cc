"""The seed of a machine: an ISO that cloud-init's NoCloud source reads."""

from __future__ import annotations

import io
import stat
from email import message_from_string
from pathlib import Path
from typing import Any

import pycdlib
import pytest
import yaml

from pytest_vmbottle import MachineSpec, SpecError
from pytest_vmbottle.backends.port import GUEST_MAC
from pytest_vmbottle.channels.port import Keys
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.provision.seed import write_seed


@pytest.fixture(scope="module")
def keys() -> Keys:
    return new_keys()


FILES = ("user-data", "meta-data", "network-config", "hostname", "authorized-keys", "host-key", "host-key-public")


def contents(path: Path) -> dict[str, str]:
    """The files of an ISO by the names that Linux shows, read with their Rock Ridge and again with their Joliet names."""
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    try:
        by_rock, by_joliet = ({name: read(iso, **{f"{kind}_path": f"/{name}"}) for name in FILES} for kind in ("rr", "joliet"))
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


def test_a_seed_has_name_and_keys_as_plain_files_too_for_images_without_cloud_init(tmp_path: Path, keys: Keys) -> None:
    write_seed(tmp_path / "seed.iso", hostname="db", keys=keys)
    files = contents(tmp_path / "seed.iso")

    assert files["hostname"] == "db\n"
    assert files["authorized-keys"] == f"{keys.user_public}\n"
    assert files["host-key"].rstrip() == keys.host_private.rstrip()
    assert files["host-key"].endswith("\n"), "OpenSSH reads no key without"
    assert files["host-key-public"] == f"{keys.host_public}\n"


@pytest.mark.parametrize(
    "data", ["#cloud-config\npackage_update: true\nhostname: mine\n", '#cloud-config\n{"package_update": true, "hostname": "mine"}']
)
def test_what_the_user_adds_wins_and_the_rest_of_ours_stays(tmp_path: Path, keys: Keys, data: str) -> None:
    write_seed(tmp_path / "seed.iso", hostname="db", keys=keys, user_data=data)
    user = yaml.safe_load(contents(tmp_path / "seed.iso")["user-data"])

    assert (user["hostname"], user["package_update"]) == ("mine", True)
    assert user["ssh_keys"]["ed25519_private"] == keys.host_private


def as_cloud_init_merges(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The cloud-config that the parts of a seed come to, and the other parts, as they begin."""
    config: dict[str, Any] = {}
    others = []
    for part in message_from_string(contents(path)["user-data"]).walk():
        payload = part.get_payload(decode=True)
        text = payload.decode() if isinstance(payload, bytes) else ""
        if text.startswith("#cloud-config\n"):
            found = yaml.safe_load(text)
            if found.pop("merge_how", None):
                config = {key: config.get(key, []) + value for key, value in found.items()} | {
                    key: value for key, value in config.items() if key not in found
                }
            else:
                config.update(found)
        elif text:
            others.append(text)
    return config, others


def written(folder: Path, keys: Keys, data: Any) -> dict[str, Any]:
    """The cloud-config of a seed for this user-data."""
    spec = MachineSpec(source="debian-12", user_data=data)
    write_seed(folder / "seed.iso", hostname="db", keys=keys, user_data=spec.user_data)
    config: dict[str, Any] = yaml.safe_load(contents(folder / "seed.iso")["user-data"])
    return config


@pytest.mark.parametrize("named", [["ssh-ed25519 theirs"], "ssh-ed25519 theirs"])
def test_the_keys_that_a_user_adds_stand_beside_ours_which_stay(tmp_path: Path, keys: Keys, named: object) -> None:
    theirs = {"ssh_authorized_keys": named, "disable_root": True, "ssh_keys": {"rsa_private": "r", "ed25519_private": "e"}}
    got = written(tmp_path, keys, theirs)

    assert got["ssh_authorized_keys"] == ["ssh-ed25519 theirs", keys.user_public]
    assert got["disable_root"] is False
    assert got["ssh_keys"] == {"rsa_private": "r", "ed25519_private": keys.host_private, "ed25519_public": keys.host_public}


@pytest.mark.parametrize(
    "data",
    [
        {"users": ["default", "root"]},
        {"users": [{"name": "joe"}, {"name": "root", "lock_passwd": True, "ssh_redirect_user": True}]},
        {"users": {"root": {"lock_passwd": True, "ssh_redirect_user": True}, "joe": {}}},
        {"user": {"name": "root", "lock_passwd": True}},
        {"user": "root"},
        {"users": "root"},
    ],
)
def test_root_is_never_locked_whatever_a_user_says_of_users(tmp_path: Path, keys: Keys, data: dict[str, Any]) -> None:
    (found,) = [value for key, value in written(tmp_path, keys, data).items() if key in ("user", "users")]
    named = found if isinstance(found, list) else [found.get("root", found)]

    assert named[-1]["lock_passwd"] is False
    assert "ssh_redirect_user" not in named[-1]
    assert named[:-1] == ([] if not isinstance(data.get("users"), list) else data["users"][:-1])


def test_a_password_for_root_does_not_expire_before_it_is_used(tmp_path: Path, keys: Keys) -> None:
    assert written(tmp_path, keys, {"chpasswd": {"users": [{"name": "root", "password": "x"}]}})["chpasswd"]["expire"] is False
    assert "expire" not in written(tmp_path, keys, {"chpasswd": {"list": "joe:x"}})["chpasswd"]


@pytest.mark.parametrize(
    ("data", "begins"),
    [
        ("#!/bin/sh\necho \N{PINEAPPLE}\n", "#!/bin/sh"),
        ("## template: jinja\n#cloud-config\nhostname: {{ v1.region }}\n", "## template: jinja"),
        ("#include\nfile:///etc/own-config\n", "#include"),
        ("#include-once\nfile:///etc/own-config\n", "#include-once"),
        ("#cloud-boothook\nmodprobe dummy\n", "#cloud-boothook"),
        ("#cloud-config-archive\n- '#!/bin/sh'\n- type: text/cloud-config\n  content: 'hostname: mine'\n", "#cloud-config-archive"),
        ('#cloud-config-jsonp\n[{"op": "add", "path": "/hostname", "value": "mine"}]\n', "#cloud-config-jsonp"),
        ("#part-handler\ndef list_types(): return []\n", "#part-handler"),
        (
            'Content-Type: multipart/mixed; boundary="x"\nMIME-Version: 1.0\n\n--x\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n--x--\n',
            "#!",
        ),
        ("MIME-Version: 1.0\nContent-Type: text/x-shellscript\n\n#!/bin/sh\necho \N{PINEAPPLE}\n", "#!/bin/sh"),
    ],
)
def test_other_kinds_of_user_data_reach_cloud_init_as_they_are_and_we_are_let_in(
    tmp_path: Path, keys: Keys, data: str, begins: str
) -> None:
    write_seed(tmp_path / "seed.iso", hostname="db", keys=keys, user_data=MachineSpec(source="debian-12", user_data=data).user_data)
    config, (other,) = as_cloud_init_merges(tmp_path / "seed.iso")

    assert other.startswith(begins)
    assert ("\N{PINEAPPLE}" in other) is ("\N{PINEAPPLE}" in data)
    assert (config["hostname"], config["disable_root"]) == ("db", False)
    assert config["ssh_keys"]["ed25519_private"] == keys.host_private
    assert config["ssh_authorized_keys"] == [keys.user_public]


def test_keys_in_a_part_of_the_users_stay_beside_ours(tmp_path: Path, keys: Keys) -> None:
    theirs = "MIME-Version: 1.0\nContent-Type: text/cloud-config\n\n#cloud-config\nssh_authorized_keys: [theirs]\ndisable_root: true\n"
    write_seed(tmp_path / "seed.iso", hostname="db", keys=keys, user_data=theirs)
    config, _ = as_cloud_init_merges(tmp_path / "seed.iso")

    assert config["ssh_authorized_keys"] == ["theirs", keys.user_public]
    assert config["disable_root"] is False


ODD = "\N{PINEAPPLE} \x7f \x85 \u2028 \ufeff"


@pytest.mark.parametrize("value", [ODD, 1e16, -0.5, True, None, 1 << 70, ["a", ["b"]], "2024-01-01", "yes"])
def test_a_value_arrives_as_it_is(tmp_path: Path, keys: Keys, value: object) -> None:
    got = written(tmp_path, keys, {"write_files": [{"content": value}]})["write_files"][0]["content"]

    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    "data",
    [
        "#cloud-config\npower_state: {mode: poweroff}\n",
        "#cloud-config\nruncmd:\n- echo hello\n- [systemctl, reboot]\n",
        "#cloud-config\nbootcmd:\n- test -e /x || /sbin/reboot -f\n",
        "#!/bin/sh\nsleep 5 && shutdown -r now &\n",
        "## template: jinja\n#cloud-config\nruncmd:\n- reboot\n",
        "#cloud-config-archive\n- |\n  #!/bin/sh\n  init 6\n",
        "MIME-Version: 1.0\nContent-Type: text/cloud-config\n\n#cloud-config\nruncmd: [halt]\n",
    ],
)
def test_what_would_end_the_first_boot_is_refused(tmp_path: Path, keys: Keys, data: str) -> None:
    with pytest.raises(SpecError, match="user_data="):
        write_seed(tmp_path / "seed.iso", hostname="db", keys=keys, user_data=data)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("#cloud-config\na: [1", "YAML"),
        ("#cloud-config\n\ta: 1", "YAML"),
        ("#cloud-config\n!!python/object/apply:os.system [touch evil]", "YAML"),
        ("#cloud-config\n- a\n", "mapping"),
        ("#cloud-config\n", "mapping"),
        ("#cloud-config\nssh_keys: [a]\n", "ssh_keys"),
        ("#cloud-config\nssh_keys: a\n", "ssh_keys"),
        pytest.param(f"#cloud-config\na: {'[' * 5000}{']' * 5000}\n", "deeply", id="deep YAML"),
        pytest.param(f"#cloud-config\n{'[' * 50_000}{']' * 50_000}", "deeply", id="deep JSON"),
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
