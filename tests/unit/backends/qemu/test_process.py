"""A process that ends with the one that started it, whatever is done to the search path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import is_gone

OWNER = """
import os, sys, time
from pathlib import Path
from pytest_vmbottle.backends.qemu.process import QemuProcess

usual, os.environ["PATH"] = os.environ["PATH"], sys.argv[1]
QemuProcess(["/bin/true"], log=Path(sys.argv[1], "first"))
os.environ["PATH"] = usual
print(QemuProcess(["/bin/sleep", "60"], log=Path(sys.argv[1], "second")).pid, flush=True)
time.sleep(60)
"""


def test_a_search_path_that_lacked_the_leash_once_does_not_lack_it_for_ever(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        process = psutil.Process(int(owner.stdout.readline()))
        asleep = Deadline(10).poll(lambda: process.name() == "sleep")
        owner.kill()

    assert asleep
    assert Deadline(10).poll(lambda: is_gone(process.pid))


def test_a_qemu_of_another_user_sees_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    account = Account(name="us", uid=os.getuid(), gid=os.getgid(), groups=tuple(os.getgroups()))
    for who, told in ((account, False), (None, True)):
        process = QemuProcess(["env"], log=tmp_path / "log", account=who)
        assert process.wait(Deadline(30)) == 0
        assert ("SECRET_TOKEN" in process.output) == told
        assert {"VMBOTTLE_MACHINE", "PATH"} <= {line.partition("=")[0] for line in process.output.splitlines()}
