"""Reports and artifacts of tests that fail on real guests: causes are found in them without the guest."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.report.run import TestArtifacts, read_run
from pytest_vmbottle.standalone.client import Kept

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_vmbottle.catalog.catalog import Catalog

Failed = tuple[str, dict[str, TestArtifacts]]

TESTS = """
import subprocess, time
import pytest

UNIT = "[Service]\\nExecStart=/usr/bin/python3 -c 'import flask'\\n"

@pytest.mark.vm("debian-12")
def test_daemon(vm):
    vm.path("/etc/systemd/system/web.service").write_text(UNIT)
    vm.exec("systemctl start web")
    vm.exec("seq 20000; echo said on the console > /dev/ttyS0; exit 3", check=False)
    vm.wait_for_console("said on the console")  # the serial port sends it after the command has ended
    vm.note("now it is asked")
    time.sleep(1.5)  # so that its resources are seen once
    assert vm.exec("systemctl is-active web", check=False).stdout == "active\\n"

@pytest.mark.vm("debian-12")
def test_silent(vm):
    vm.exec("echo last words > /dev/ttyS0")
    vm.pause()
    raise RuntimeError("it is paused")

@pytest.mark.vm("debian-12")
def test_panic(vm):
    vm.exec("echo c > /proc/sysrq-trigger")
"""

SCREEN = """
import pytest

@pytest.mark.vm("debian-12", display=True)
def test_screen(vm):
    assert False
"""


KEPT = """
import pytest

@pytest.mark.vm("debian-12")
def test_kept(vm):
    vm.exec("echo in RAM > /dev/shm/state; echo on disk > /root/state")
    assert False

@pytest.mark.vm("debian-12")
def test_fine(vm):
    pass
"""


def command(words: list[str], folder: Path, catalog: Catalog) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in a folder, with a catalog."""
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS" and not name.startswith("PYTEST_XDIST")}
    argv = [sys.executable, "-m", *words]
    env["VMBOTTLE_CATALOG"] = str(catalog.root)
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, vm_catalog: Catalog) -> Failed:
    """Output and artifacts of a run whose tests fail."""
    return run_of(TESTS, tmp_path_factory.mktemp("failures"), vm_catalog)


def run_of(tests: str, folder: Path, catalog: Catalog) -> Failed:
    """Run tests that fail; return the output, and the artifacts of each."""
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\n")
    done = command(["pytest", "-p", "no:cacheprovider", "--color=no"], folder, catalog)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout, {test.nodeid.partition("::")[2]: test for test in read_run(folder / "vmbottle-artifacts")}


def test_a_daemon_that_cannot_start_is_told_with_its_own_words(failed: Failed) -> None:
    text, tests = failed
    test = tests["test_daemon"]
    folder = test.folder / "vm"

    units = text[text.index("vm: units that failed") :]
    assert "No module named 'flask'" in units[: units.index(" artifacts ")]
    assert "No module named 'flask'" in (folder / "journal.txt").read_text()
    assert "said on the console" in (folder / "console.txt").read_text()


def test_the_whole_output_of_a_failed_command_is_in_a_file(failed: Failed) -> None:
    test = failed[1]["test_daemon"]
    (event,) = [event for event in test.events() if event.get("status") == 3 and "seq 20000" in str(event["argv"])]

    assert event["stdout"].endswith("20000\n")
    assert (test.folder / "vm" / "outputs" / event["stdout_file"]).read_text().startswith("1\n2\n3\n")


def test_a_machine_is_described_and_its_resources_are_sampled(failed: Failed) -> None:
    folder = failed[1]["test_daemon"].folder / "vm"
    facts = json.loads((folder / "machine.json").read_text())
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))

    assert "qemu-system" in facts["argv"][0]
    assert re.fullmatch("[0-9a-f]{64}", facts["image_sha256"])
    assert re.fullmatch("[0-9a-f]{64}", facts["pack"]["key"])
    assert facts["pack"]["kind"] in ("template", "stream", "disk")
    assert all(int(row["rss_bytes"]) > 1 << 20 for row in rows)
    assert rows


def test_events_of_guest_and_test_are_in_one_order(failed: Failed) -> None:
    events = list(failed[1]["test_daemon"].events())
    kinds = [event["kind"] for event in events if event["kind"] not in ("metrics", "answer")]
    line = next(event for event in events if event["kind"] == "console" and "said on the console" in event["text"])
    note = next(event for event in events if event["kind"] == "note")

    assert kinds[0] == "power"
    assert line["time"] <= note["time"]


def test_a_guest_that_cannot_answer_is_told_with_what_it_said_before(failed: Failed) -> None:
    text, tests = failed

    assert "RuntimeError: it is paused" in text
    assert "the machine is paused" in text
    assert "last words" in (tests["test_silent"].folder / "vm" / "console.txt").read_text()
    assert not (tests["test_silent"].folder / "vm" / "journal.txt").exists()


@pytest.mark.guests
def test_a_machine_with_a_display_leaves_its_screen(tmp_path: Path, vm_catalog: Catalog) -> None:
    assert (run_of(SCREEN, tmp_path, vm_catalog)[1]["test_screen"].folder / "vm" / "screenshot.png").read_bytes().startswith(b"\x89PNG")


def test_a_panic_is_told_as_what_it_is(failed: Failed) -> None:
    test = failed[1]["test_panic"]

    assert "GuestPanic" in test.error
    assert "sysrq" in (test.folder / "vm" / "console.txt").read_text().lower()


BOOTS = """
import os, signal, threading
import pytest

@pytest.mark.vm("debian-12", fresh="boot", timeout=1)
def test_slow(vm):
    pass

@pytest.fixture
def interrupted():
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()

@pytest.mark.vm("debian-12", fresh="boot")
def test_interrupted(interrupted, vm):
    pass
"""


@pytest.mark.guests
def test_machines_that_never_booted_leave_what_they_said(tmp_path: Path, vm_catalog: Catalog) -> None:
    (tmp_path / "test_it.py").write_text(BOOTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    ran = command(["pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "--vm-infra-retries=0", "--color=no"], tmp_path, vm_catalog)
    assert ran.returncode == pytest.ExitCode.INTERRUPTED, ran.stdout + ran.stderr
    tests = {test.nodeid.partition("::")[2]: test for test in read_run(tmp_path / "vmbottle-artifacts")}

    assert "MachineTimeout" in tests["test_slow"].error
    assert tests["test_interrupted"].error == "interrupted"
    for test in tests.values():
        folder = test.folder / "vm"
        assert test.phase == "setup"
        assert "SeaBIOS" in (folder / "console.txt").read_text()
        assert "qemu-system" in json.loads((folder / "machine.json").read_text())["argv"][0]
        assert any("SeaBIOS" in event["text"] for event in test.events() if event["kind"] == "console")


@pytest.mark.guests
def test_the_machine_of_a_failed_test_lives_on_for_a_while(tmp_path: Path, vm_catalog: Catalog) -> None:
    (tmp_path / "test_it.py").write_text(KEPT)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    ran = command(
        ["pytest", "-p", "no:cacheprovider", "--vm-keep=failed", "--vm-keep-for=10m", "--vm-fail-on-leak", "--color=no"],
        tmp_path,
        vm_catalog,
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    try:
        assert "machine shell test_kept\n" in ran.stdout
        assert "left behind: nothing" in ran.stdout
        told = command(
            ["pytest_vmbottle", "machine", "exec", "test_kept", "--", "cat", "/dev/shm/state", "/root/state"], tmp_path, vm_catalog
        )
        assert (told.stdout, told.returncode) == ("in RAM\non disk\n", 0), told.stderr
        listed = json.loads(command(["pytest_vmbottle", "machine", "ls", "--json"], tmp_path, vm_catalog).stdout)
        (record,) = [record for record in listed if record["name"] == "test_kept"]
        assert record["state"] == "running"
        assert 0 < record["until"] - time.time() <= 600
        assert "test_fine" not in str(listed)
    finally:
        stopped = command(["pytest_vmbottle", "machine", "rm", "--force", "test_kept"], tmp_path, vm_catalog)
    assert stopped.returncode == 0, stopped.stderr


@pytest.mark.guests
def test_a_kept_machine_ends_when_its_time_is_over(tmp_path: Path, vm_catalog: Catalog) -> None:
    (tmp_path / "test_it.py").write_text(KEPT.replace("test_kept", "test_brief"))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    ran = command(["pytest", "-p", "no:cacheprovider", "--vm-keep=failed", "--vm-keep-for=1s"], tmp_path, vm_catalog)
    assert "machine shell test_brief" in ran.stdout
    place = Kept(vm_catalog.machines / "test_brief")
    try:
        assert place.wait(Deadline(120))
        assert place.record().state == "stopped"
        assert not (place.folder / "snapshot").exists()
    finally:
        place.discard()


@pytest.mark.guests
@pytest.mark.vm("debian-12")
def test_the_journal_has_the_units_own_words(vm: Machine) -> None:
    vm.exec("systemd-run --unit=greeter --wait echo hello from a unit")

    assert "hello from a unit" in vm.journal("greeter.service")
    assert "hello from a unit" not in vm.journal("ssh.service", lines=3)
    assert "hello from a unit" in vm.journal(since=float(vm.exec(["date", "+%s"]).stdout) - 60)
    assert vm.journal("nothing.service") == ""
