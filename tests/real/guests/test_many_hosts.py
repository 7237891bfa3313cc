"""Real machines on a host that is reached by ssh."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import is_gone
from tests.plugin.conftest import said
from tests.ssh_hosts import SshServer, ssh_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_vmbottle.catalog.catalog import Catalog

SUITE = """
import pytest

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("name", ["one", "two"])
def test_it(vm, name):
    vm.path("/root/note").write_text(name)
    assert vm.exec("cat /root/note").stdout == "one"
"""
SLEEPER = """
import pytest, time

@pytest.mark.vm("debian-12")
def test_sleeps(vm):
    with open({flag!r}, "w") as file:
        file.write(str(vm.pid))
    time.sleep(10_000)
"""


@pytest.fixture
def lab(tmp_path: Path, vm_catalog: Catalog) -> Iterator[SshServer]:
    """A host with the packs of this run; the controller's own catalog is an empty one."""
    with ssh_server(tmp_path / "lab", vm_catalog.root) as server:
        yield server


def test_machines_of_a_host_run_tests_and_one_is_kept_there(
    inner: pytest.Pytester, lab: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(tmp_path / "own"))
    inner.makepyfile(test_it=SUITE)
    result = inner.runpytest_subprocess(
        "-p", "xdist", "-n1", f"--vm-hosts={lab.address()}", "--vm-keep=failed", "--vm-keep-for=10m", "--vm-missing=fail"
    )
    text = said(result)
    result.assert_outcomes(passed=1, failed=1)
    kept = re.search(r"^vmbottle: kept for .*: (ssh -t .*)$", text, re.MULTILINE)
    assert kept, text
    # As it is told, but for the terminal, which there is none of here.
    *ssh, shell = [word for word in shlex.split(kept[1]) if word != "-t"]

    def by_hand(command: str) -> str:
        return subprocess.run([*ssh, command], check=True, capture_output=True, text=True).stdout

    try:
        assert by_hand(f"{shell.replace('machine shell', 'machine exec')} cat /root/note") == "two"
    finally:
        by_hand(shell.replace("machine shell", "machine rm --force"))
    [folder] = (inner.path / "vmbottle-artifacts").glob("*test_it*")
    assert "cat /root/note" in (folder / "timeline.jsonl").read_text()
    assert not (tmp_path / "own").exists()
    assert list(lab.runs.iterdir()) == []


def test_a_list_of_hosts_has_what_their_doctors_say_and_who_cannot_be_asked(lab: SshServer) -> None:
    argv = [sys.executable, "-m", "pytest_vmbottle", "hosts", lab.address(), "ssh://127.0.0.1:1"]
    listed = subprocess.run([*argv, "--json"], check=False, capture_output=True, text=True)
    found, lost = json.loads(listed.stdout)

    assert listed.returncode == 3
    assert found["host"] == "ssh://lab"
    assert found["able"]
    assert found["accelerator"] in ("kvm", "tcg")
    assert found["memory"] > 1 << 28
    assert "debian-12" in found["packs"]
    assert found["problem"] == ""
    assert not lost["able"]
    assert "ssh://127.0.0.1:1: ssh: connect to host 127.0.0.1 port 1: Connection refused" in listed.stderr
    shown = subprocess.run(argv, check=False, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[:2] for line in shown] == [["HOST", "STATE"], ["ssh://lab", "ok"], ["ssh://127.0.0.1:1", "unable"]]


def test_a_machine_on_a_host_ends_soon_after_its_controller_is_killed(inner: pytest.Pytester, lab: SshServer, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    inner.makepyfile(test_it=SLEEPER.format(flag=str(flag)))
    argv = [sys.executable, "-m", "pytest", "-p", "xdist", "-n1", f"--vm-hosts={lab.address()}", "--vm-missing=fail"]
    with subprocess.Popen(argv, cwd=inner.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        assert Deadline(120).poll(lambda: (flag.exists() and flag.read_text()) or run.poll() is not None)
        pid = int(flag.read_text())
        os.kill(run.pid, signal.SIGKILL)
        deadline = Deadline(30)
        assert deadline.poll(lambda: is_gone(pid), every=0.02)
        print(f"gone after {30 - deadline.remaining:.2f} s")  # noqa: T201 - a figure
    assert Deadline(30).poll(lambda: not list(lab.runs.iterdir()))
