"""Workers on other hosts, reached by ssh: the user sees what local workers would show, and nothing is left there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import is_gone
from tests.plugin.conftest import CONFTEST, said
from tests.ssh_hosts import SshServer, ssh_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]

TEXT = """
import os

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(4))
def test_it(vm, n, vm_catalog, tmp_path):
    print("in", os.getcwd(), "on", vm_catalog.root, tmp_path)
    assert n != 2
"""
# Tells its process, and goes on for ever, whatever interrupts it.
ENDLESS = """
import pytest, os, time

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(2))
def test_it(vm, n):
    with open({folder!r} + "/" + str(os.getpid()), "w"):
        while True:
            try:
                time.sleep(10_000)
            except KeyboardInterrupt:
                pass
"""


@contextmanager
def _host(folder: Path, catalog: Path) -> Iterator[SshServer]:
    with ssh_server(folder) as server:
        shutil.copytree(catalog, server.catalog)
        yield server


@pytest.fixture
def lab(tmp_path: Path, catalog: Path) -> Iterator[SshServer]:
    """A host with the image "debian-12" in a catalog of its own."""
    with _host(tmp_path / "lab", catalog) as server:
        yield server


@pytest.fixture
def other(tmp_path: Path, catalog: Path) -> Iterator[SshServer]:
    """Another such host."""
    with _host(tmp_path / "other", catalog) as server:
        yield server


@pytest.fixture
def workers(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[subprocess.Popen[bytes], list[int]]]:
    """Starts a run whose tests do not end; returns it, and the processes of its two workers."""
    monkeypatch.setenv("VMBOTTLE_BACKEND", "fake")
    (tmp_path / "pids").mkdir()
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=ENDLESS.format(folder=str(tmp_path / "pids")))

    def workers(*hosts: SshServer) -> tuple[subprocess.Popen[bytes], list[int]]:
        argv = [sys.executable, "-m", "pytest", "-p", "xdist", "-n2", f"--vm-hosts={','.join(host.address() for host in hosts)}"]
        with (tmp_path / "out").open("wb") as out:
            running = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        assert Deadline(60).poll(lambda: len(list((tmp_path / "pids").iterdir())) == 2), (tmp_path / "out").read_text()
        return running, [int(path.name) for path in (tmp_path / "pids").iterdir()]

    return workers


def test_tests_run_on_a_host_and_their_reports_and_artifacts_come_back(run: Run, lab: SshServer, pytester: pytest.Pytester) -> None:
    result = run(TEXT, "-n2", f"--vm-hosts={lab.address()}", "--junitxml=out.xml", status=1, passed=3, failed=1)
    text = said(result)

    assert f"on {lab.catalog}" in text
    assert f"in {lab.runs}" in text
    [folder] = (pytester.path / "vmbottle-artifacts").glob("*test_it*")
    assert (folder / "vm" / "console.txt").read_text().strip() == "vm started"
    assert f"vmbottle-artifacts/{folder.name}\n" in text
    assert (pytester.path / "vmbottle-artifacts" / "index.html").is_file()
    assert len(list(ET.parse(pytester.path / "out.xml").iter("testcase"))) == 4
    # Progress comes from workers at once, and what they count at the end.
    assert "\nvmbottle: building the template pack of debian-12" in text
    assert "vmbottle: ssh://lab: fake (1)" in text
    assert re.search(r"^vmbottle: 4 machines restored, 1 booted", text, re.MULTILINE)
    assert list(lab.runs.iterdir()) == []


def test_a_host_that_cannot_be_reached_is_told_in_the_words_of_ssh(run: Run, lab: SshServer) -> None:
    lab.process.terminate()
    lab.process.wait()
    result = run(TEXT, "-n2", f"--vm-hosts={lab.address()}", status=pytest.ExitCode.USAGE_ERROR)

    assert f"ssh://lab: ssh: connect to host 127.0.0.1 port {lab.port}: Connection refused" in said(result)


def test_hosts_of_the_project_are_left_alone_where_tests_are_only_looked_at(
    pytester: pytest.Pytester, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert catalog.is_dir()
    monkeypatch.setenv("VMBOTTLE_HOSTS", "ssh://127.0.0.1:1")
    pytester.makepyfile(test_it=f"import pytest\n{TEXT}")
    planned = pytester.run(sys.executable, "-m", "pytest_vmbottle", "ci", "plan", "--shards", "1")

    assert planned.ret == 0, said(planned)
    assert '"tests": 4' in planned.stdout.str()


@pytest.mark.guests
def test_a_host_is_refused_in_words_whatever_is_wrong_with_it(run: Run, lab: SshServer, tmp_path: Path) -> None:
    def refused(address: str) -> str:
        return said(run(TEXT, "-n2", f"--vm-hosts={address}", status=pytest.ExitCode.USAGE_ERROR))

    assert "ssh://lab: the project could not be copied: [Errno" in refused(lab.address().replace(str(lab.runs), "/dev/null/runs"))
    # A login shell that greets, or a program in the place of Python.
    (tmp_path / "python").write_text("#!/bin/sh\necho Welcome; exec sleep 60\n")
    (tmp_path / "python").chmod(0o700)
    assert "ssh://lab: the login shell writes 'Welcome' to its standard output" in refused(lab.address(python=str(tmp_path / "python")))
    (lab.folder / "known_hosts").write_text("")
    assert "ssh://lab: No ED25519 host key is known for [127.0.0.1]" in refused(lab.address())
    assert not lab.runs.exists()


@pytest.mark.guests
def test_a_host_without_the_plugin_is_refused_with_the_command_that_installs_it(run: Run, lab: SshServer) -> None:
    # The interpreter that the virtual environment of this one was made by.
    bare = os.path.realpath(sys.executable)
    result = run(TEXT, "-n2", f"--vm-hosts={lab.address(python=bare)}", status=pytest.ExitCode.USAGE_ERROR)

    assert re.search(r"ssh://lab: .* has no pytest-vmbottle: .*pip install 'pytest-vmbottle\[xdist\]==", said(result))
    assert not lab.runs.exists()


@pytest.mark.guests
def test_a_host_with_another_version_of_the_plugin_is_refused(run: Run, lab: SshServer, tmp_path: Path) -> None:
    # A stand-in for an older environment: everything of this one, but the version that the package says.
    (tmp_path / "old" / "pytest_vmbottle-0.0.9.dist-info").mkdir(parents=True)
    (tmp_path / "old" / "pytest_vmbottle-0.0.9.dist-info" / "METADATA").write_text("Name: pytest-vmbottle\nVersion: 0.0.9\n")
    (tmp_path / "python").write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/old exec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o700)
    result = run(TEXT, "-n2", f"--vm-hosts={lab.address(python=str(tmp_path / 'python'))}", status=pytest.ExitCode.USAGE_ERROR)

    assert re.search(r"ssh://lab has pytest-vmbottle 0\.0\.9, and this run [0-9.]+", said(result))


@pytest.mark.guests
def test_workers_are_divided_among_hosts_and_a_test_without_its_machine_names_its_host(
    run: Run, lab: SshServer, other: SshServer, tmp_path: Path
) -> None:
    # The other host has no image, and nothing to make one of.
    shutil.rmtree(other.catalog / "images")
    text = TEXT.replace("debian-12", "my-image").replace("n != 2", "True")
    shutil.copyfile(tmp_path / "disk.raw", tmp_path / "my.raw")
    subprocess.run(
        [sys.executable, "-m", "pytest_vmbottle", "--catalog", lab.catalog, "image", "add", tmp_path / "my.raw", "--name", "my-image"],
        check=True,
    )
    result = run(text, "-n2", "--dist=each", f"--vm-hosts={lab.address()},{other.address()}", status=1, passed=4, errors=4)

    assert re.search(r"INFRA: .*my-image.* \(on ssh://other\)", said(result))
    assert "\nhost: ssh://other" in said(result)
    assert "(on ssh://lab)" not in said(result)


@pytest.mark.guests
def test_a_run_over_hosts_stops_at_the_first_failure_and_takes_up_what_failed(run: Run, lab: SshServer) -> None:
    hosts = f"--vm-hosts={lab.address()}"
    first = run(TEXT.replace("n != 2", "n"), "-n2", "-x", "-p", "cacheprovider", hosts, status=pytest.ExitCode.INTERRUPTED)
    again = run(TEXT.replace("n != 2", "n"), "-n2", "--lf", hosts, status=1, failed=1)

    assert "stopping after 1 failures" in said(first)
    assert "test_it[0]" in said(again)
    assert list(lab.runs.iterdir()) == []


@pytest.mark.guests
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_of_a_run_that_ends_is_left_on_its_host(
    workers: Callable[..., tuple[subprocess.Popen[bytes], list[int]]], lab: SshServer, number: signal.Signals
) -> None:
    running, pids = workers(lab)
    # To all processes of the terminal, as Ctrl-C is sent; a kill is for one.
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)

    # execnet alone would take 15 s.
    assert Deadline(12).poll(lambda: all(map(is_gone, pids)))
    assert Deadline(30).poll(lambda: not list(lab.runs.iterdir()))
    assert Deadline(10).poll(lambda: not list((lab.catalog / "run").iterdir()))
    assert running.wait(30) == (pytest.ExitCode.INTERRUPTED if number == signal.SIGINT else -signal.SIGKILL)
    assert Deadline(10).poll(lambda: len(psutil.Process(lab.process.pid).children(recursive=True)) == 0)


@pytest.mark.guests
def test_tests_of_a_host_that_is_lost_run_on_another_one(run: Run, lab: SshServer, other: SshServer) -> None:
    # One of the host's own tests ends all of its connections, and the server for new ones.
    text = f"""
import os, psutil, time

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(8))
def test_it(vm, n, vm_catalog):
    if str(vm_catalog.root) == {str(lab.catalog)!r}:
        server = psutil.Process({lab.process.pid})
        for process in [server, *[each for each in server.children(recursive=True) if each.name() == "sshd"]]:
            process.kill()
        time.sleep(100)
"""
    result = run(text, "-n2", f"--vm-hosts={lab.address()},{other.address()}", status=1, passed=7, failed=1)

    assert "vmbottle: ssh://lab cannot be reached any more: gw0 is lost" in said(result)
    assert list(other.runs.iterdir()) == []
