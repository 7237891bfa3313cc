"""The files by which OpenSSH reaches a machine."""

from __future__ import annotations

from pathlib import Path

import paramiko
import pytest

from pytest_vmbottle import MachineError
from pytest_vmbottle.backends.port import SshAccess
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.machine.openssh import write_config


def access(folder: Path, port: int = 2222) -> SshAccess:
    folder.mkdir(mode=0o700, exist_ok=True)
    return SshAccess(address=("127.0.0.1", port), user="root", keys=new_keys(), folder=folder)


def test_a_parser_of_the_format_finds_address_user_and_key(tmp_path: Path) -> None:
    known = access(tmp_path / "machine")
    config = paramiko.SSHConfig.from_path(str(write_config(known, "web"))).lookup("web")

    assert (config["hostname"], config["port"], config["user"], config["hostkeyalias"]) == ("127.0.0.1", "2222", "root", "web")
    assert config["stricthostkeychecking"] == config["identitiesonly"] == config["batchmode"] == "yes"
    assert Path(config["identityfile"][0].strip('"')).read_text() == known.keys.user_private
    assert Path(config["userknownhostsfile"].strip('"')).read_text() == f"web {known.keys.host_public}\n"


def test_all_files_are_private_and_lie_in_the_machines_folder_alone(tmp_path: Path) -> None:
    config = write_config(access(tmp_path / "machine"), "vm")
    files = sorted((tmp_path / "machine").iterdir())

    assert config in files
    assert len(files) == 3
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]


def test_written_again_it_says_what_is_right_now(tmp_path: Path) -> None:
    first = write_config(access(tmp_path / "machine", port=1), "vm")

    assert write_config(access(tmp_path / "machine", port=2), "vm") == first
    assert "Port 2\n" in first.read_text()


def test_a_folder_with_blanks_and_percent_signs_is_quoted(tmp_path: Path) -> None:
    text = write_config(access(tmp_path / "a b%h"), "vm").read_text()

    assert f'IdentityFile "{tmp_path}/a b%%h/ssh_key"\n' in text


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "new\nline", "${HOME}"])
def test_a_folder_that_openssh_cannot_be_told_of_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MachineError, match="--vm-catalog"):
        write_config(access(tmp_path / name), "vm")

    assert list((tmp_path / name).iterdir()) == []
