"""Who QEMU runs as, where that is not who runs us, and how it gets at its files then."""

from __future__ import annotations

import os
import pwd
from contextlib import closing
from pathlib import Path

import pytest

from pytest_vmbottle import SpecError
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.run_as import PassedFds
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline

NOBODY = pwd.getpwnam("nobody")


def test_a_user_is_named_or_numbered_and_brings_its_groups() -> None:
    named, numbered = Account.parse("nobody"), Account.parse(str(NOBODY.pw_uid))

    assert (named.uid, named.gid) == (numbered.uid, numbered.gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert NOBODY.pw_gid in named.groups


def test_a_group_can_be_chosen_and_numbers_need_no_entry() -> None:
    assert Account.parse("nobody:4321").gid == 4321
    stranger = Account.parse("87654:4321")
    assert (stranger.uid, stranger.gid, stranger.groups) == (87654, 4321, ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nobody-of-that-name", "user 'nobody-of-that-name'"),
        ("nobody:nobody-of-that-name", "group 'nobody-of-that-name'"),
        ("87654", "group"),
        ("root", "root"),
        ("0:4321", "root"),
        ("nobody:0", "group"),
        ("99999999999:1", "99999999999"),
        ("", "''"),
    ],
)
def test_what_is_no_account_to_run_as_is_told(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Account.parse(text)


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o600, 0o606, 0o664])
def test_whether_a_device_can_be_opened_is_told_by_its_mode(tmp_path: Path, mode: int) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    stranger = Account(name="x", uid=os.getuid() + 1, gid=os.getgid() + 1, groups=())

    assert stranger.may_open(device) is (mode & 0o006 == 0o006)
    assert Account(name="x", uid=os.getuid() + 1, gid=1, groups=(os.getgid(),)).may_open(device) is (mode & 0o060 == 0o060)
    assert Account(name="x", uid=os.getuid(), gid=1, groups=()).may_open(device)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as somebody else")
def test_a_file_that_is_lent_is_read_by_who_could_not_reach_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    secret = tmp_path / "secret"
    secret.write_text("lent\n")
    secret.chmod(0o444)
    with closing(PassedFds()) as loans:
        name = loans.file(secret)
        for path, said in ((secret, "Permission denied"), (name, "lent")):
            process = QemuProcess(["/bin/cat", str(path)], log=tmp_path / "log", fds=loans.fds, account=Account.parse("nobody"))
            process.wait(Deadline(20))
            assert said in process.output
        held = list(loans.fds)
    for fd in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
