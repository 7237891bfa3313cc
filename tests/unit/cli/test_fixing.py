"""`vmbottle doctor --fix`, on search paths made for the purpose: the commands that it runs are programs of this test."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle.cli.fixing import mend
from pytest_vmbottle.host.findings import Command, Finding, Remedy, State, install

APT = """
echo "$@" >>"$0.log"
case "$*" in *util-linux) printf '#!/bin/sh\\n' >"${0%/*}/setpriv"; /bin/chmod 700 "${0%/*}/setpriv" ;; esac
"""


@attrs.frozen
class Host:
    """A host that has what is in one folder, and nothing else."""

    bin: Path
    catalog: Path

    def program(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o700)

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "pytest_vmbottle", "doctor", *words]

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": str(self.bin), "VMBOTTLE_CATALOG": str(self.catalog), "HOME": str(self.catalog.parent)}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*words), env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )

    def answer(self, answers: str, *words: str) -> str:
        """What is said on stderr when the questions are answered on a terminal."""
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "wb", buffering=0) as keyboard:
            process = subprocess.Popen(
                self.argv(*words), env=self.env, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            os.close(theirs)
            keyboard.write(answers.encode())
            return process.communicate(timeout=60)[1]

    @property
    def ran(self) -> list[str]:
        log = self.bin / "apt-get.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "bin").mkdir()
    (tmp_path / "catalog").mkdir(mode=0o700)
    made = Host(tmp_path / "bin", tmp_path / "catalog")
    made.program("sudo", 'exec "$@"')
    made.program("apt-get", APT)
    return made


def test_with_yes_every_command_is_run_once_and_the_host_is_looked_at_again(host: Host) -> None:
    ended = host.run("--fix", "--yes")
    before, _, after = ended.stdout.partition("ok        system")[2].partition("ok        system")

    assert host.ran.count("update") == 1
    assert {"install --yes qemu-system-x86 qemu-utils", "install --yes util-linux"} <= set(host.ran)
    assert "setpriv is not in the search path" in before
    assert f"ok        setpriv          {host.bin / 'setpriv'}" in after
    assert "  done: sudo apt-get install --yes util-linux\n" in ended.stderr
    assert ended.returncode == 3


def test_on_a_terminal_each_command_is_run_only_if_its_user_says_so(host: Host) -> None:
    assert "left out, with what follows it" in host.answer("n\n" * 9, "--fix")
    assert host.ran == []

    said = host.answer("y\ny\n" + "n\n" * 9, "--fix")
    assert host.ran == ["update", "install --yes qemu-system-x86 qemu-utils"]
    assert "run  sudo apt-get update ? [y/N]" in said


def test_what_follows_a_command_that_failed_is_not_run(host: Host) -> None:
    host.program("apt-get", 'echo "$@" >>"$0.log"; exit 100')
    ended = host.run("--fix", "--yes")

    assert host.ran == ["update"]
    assert "failed, with status 100: sudo apt-get update\n" in ended.stderr


def test_a_program_that_is_missing_is_told_without_a_traceback(host: Host) -> None:
    (host.bin / "apt-get").write_text("not a program")
    (host.bin / "apt-get").unlink()
    (host.bin / "sudo").unlink()
    ended = host.run("--fix", "--yes")

    assert ended.returncode == 3
    assert "failed: there is no " in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--yes",), "--yes is for --fix"),
        (("--fix", "--json"), "call it without --json"),
        (("--fix",), "there is no terminal to ask on: add --yes"),
    ],
    ids=["yes", "json", "no-terminal"],
)
def test_wrong_calls_are_refused_before_anything_is_run(host: Host, words: tuple[str, ...], told: str) -> None:
    ended = host.run(*words)

    assert (ended.returncode, ended.stdout, host.ran) == (2, "", [])
    assert told in ended.stderr


def wanting(remedy: str) -> list[Finding]:
    return [Finding(topic="kettle", state=State.MISSING, text="there is no tea", remedy=remedy)]


def test_a_command_reads_what_is_for_it_and_no_shell_sees_its_words(tmp_path: Path) -> None:
    words = (str(shutil.which("tee")), str(tmp_path / "$(touch shell); rule"))

    assert mend(wanting(Remedy.of(Command(words, reads="a 'rule'\n"))), ask=False)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("$(touch shell); rule", "a 'rule'\n")]


def test_what_takes_a_persons_own_shell_is_told_and_not_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert not mend(wanting("ulimit -n 4096"), ask=False)
    assert "not run, because it takes your own shell or hand: ulimit -n 4096\n" in capfd.readouterr().err


def test_the_note_of_a_remedy_follows_its_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert mend(wanting(Remedy.of(Command(("/bin/true",)), note="then log in again")), ask=False)
    assert capfd.readouterr().err.endswith("done: /bin/true\n  then log in again\n")


def test_what_is_well_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    well = Finding(topic="kettle", state=State.OK, text="not used", remedy=install(["tea"]))

    assert not mend([well], ask=False)
    assert capfd.readouterr().err == "There is nothing to fix.\n"


def test_a_remedy_is_the_line_that_people_copy() -> None:
    write = Command(("sudo", "tee", "/etc/a file"), reads='MODE="0660"\n')

    assert Remedy.of(write, Command(("sudo", "true")), note="why") == """echo 'MODE="0660"' | sudo tee '/etc/a file' && sudo true  # why"""
    assert install(["tea", "milk"]) == "sudo apt-get install tea milk"
