"""`vmbottle machine start`, `stop`, `snapshot`, `run` and the like: the life of machines by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host.deadline import Deadline
from tests.real.test_machine_commands import Commands

if TYPE_CHECKING:
    from tests.real.conftest import Person

SERVER = ("systemd-run", "--unit=site", "python3", "-m", "http.server", "--directory", "/etc", "8000")


def free_port() -> int:
    """A port that nobody listens on; somebody may take it before it is used, which is unlikely."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def commands(vm_catalog: Catalog) -> Commands:
    return Commands(vm_catalog.root)


@pytest.fixture(scope="module")
def web(commands: Commands) -> Iterator[str]:
    """A machine that the tests of this file use, one after the other."""
    name = f"life{os.getpid()}"
    commands.start(name, "--port", f"{free_port()}:8000")
    yield name
    commands.run("rm", "--force", name)


@pytest.fixture
def name(commands: Commands, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name for a machine, of which nothing is left."""
    name = f"l{os.getpid()}-{abs(hash(request.node.name)) % 10**6}"
    yield name
    with suppress(AssertionError):
        commands.run("rm", "--force", name)


def boot_id(commands: Commands, name: str) -> str:
    return commands.exec(name, "cat", "/proc/sys/kernel/random/boot_id")


def state(commands: Commands, name: str) -> str | None:
    return (commands.about(name) or {}).get("state")


@pytest.mark.guests
def test_a_command_needs_no_dashes_before_it(commands: Commands, web: str) -> None:
    assert b"hostname" in commands.run("exec", web, "ls", "-1", "/etc").stdout
    assert commands.run("exec", web, "-u", "nobody", "id", "-un").stdout == b"nobody\n"


@pytest.mark.guests
def test_a_machine_is_shown_with_all_its_facts_and_listed_by_its_name(commands: Commands, web: str) -> None:
    facts = json.loads(commands.run("show", web, "--json").stdout)
    (listed,) = json.loads(commands.run("list", web, "--json").stdout)

    assert facts.items() >= listed.items()
    assert (facts["can_start_again"], facts["snapshots"]) == (True, [])
    assert re.search(rf"^name +{web}$", commands.run("show", web).stdout.decode(), re.MULTILINE)
    assert b"nosuch" in commands.run("ls", "nosuch", status=1).stderr


@pytest.mark.guests
def test_ports_are_forwarded_at_the_start_and_while_the_machine_runs(commands: Commands, web: str) -> None:
    given = (commands.about(web) or {})["ports"]["8000"]
    commands.exec(web, *SERVER)
    commands.exec(web, "timeout", "60", "sh", "-c", "until ss -ltn | grep -q :8000; do sleep 0.2; done")
    with urllib.request.urlopen(f"http://{given}/hostname", timeout=30) as answer:
        assert answer.status == 200
    address = commands.run("forward", web, "22").stdout.decode().strip()

    assert commands.run("forward", web, "8000").stdout.decode().strip() == given
    assert (commands.about(web) or {})["ports"] == {"8000": given, "22": address}


@pytest.mark.guests
def test_the_journal_and_the_console_are_shown_as_text_and_as_json(commands: Commands, web: str) -> None:
    commands.exec(web, "sh", "-c", r"printf 'a \033[31mline\n' | tee /dev/console | systemd-cat -t mine")
    console = json.loads(commands.run("logs", web, "--json").stdout)
    journal = json.loads(commands.run("journal", web, "-n", "50", "--json").stdout)

    assert r"a \x1b[31mline" in console["lines"]
    assert any("mine" in line for line in journal["lines"])
    assert b"\x1b" not in commands.run("journal", web, "-n", "50").stdout


@pytest.mark.guests
def test_a_command_gets_the_keys_of_a_terminal_when_asked_to(commands: Commands, web: str, person: Person) -> None:
    for words, answer in (
        (("-i", web, "head", "-n1"), "typed"),
        (("-t", "-w", "/tmp", "-e", "A=b", web, "sh", "-c", "tty; pwd; echo $A"), ""),
    ):
        running = commands.begin("exec", *words, stdin=person.terminal, stdout=person.terminal, stderr=person.terminal)
        if answer:
            person.type(f"{answer}\n")
            person.sees(f"{answer}\\s+{answer}")  # the terminal's echo, and the command's output
        else:
            person.sees(r"/dev/pts/\d+\s+/tmp\s+b")
        assert person.watches(running) == 0


@pytest.mark.guests
def test_a_machine_is_paused_and_rebooted(commands: Commands, web: str) -> None:
    before = boot_id(commands, web)
    commands.run("pause", web)
    assert state(commands, web) == "paused"
    commands.run("resume", web)
    assert state(commands, web) == "running"
    assert boot_id(commands, web) == before
    commands.run("reboot", web)

    assert boot_id(commands, web) != before


@pytest.mark.guests
def test_a_machine_goes_back_to_a_snapshot_running_or_not_and_others_start_from_it(commands: Commands, web: str, name: str) -> None:
    commands.exec(web, "sh", "-c", "echo first > /root/note")
    commands.run("snapshot", web, "clean")
    boot = boot_id(commands, web)
    commands.exec(web, "sh", "-c", "echo second > /root/note")
    commands.run("start", f"{web}@clean", "--name", name)
    commands.run("restore", web, "clean")

    assert commands.exec(web, "cat", "/root/note") == commands.exec(name, "cat", "/root/note") == "first\n"
    commands.run("stop", "--now", web)
    commands.run("restore", web, "clean")
    assert (boot_id(commands, web), commands.exec(web, "cat", "/root/note")) == (boot, "first\n")
    assert [each["label"] for each in json.loads(commands.run("snapshots", web, "--json").stdout)] == ["clean"]
    assert b"'none'" in commands.run("restore", web, "none", status=1).stderr
    assert b"letters" in commands.run("snapshot", web, "../up", status=2).stderr
    commands.run("snapshot", web, "other")
    commands.run("snapshots", web, "--rm", "other")
    assert b"other" not in commands.run("snapshots", web).stdout


@pytest.mark.guests
def test_a_machine_that_is_off_starts_again_as_it_was_with_what_was_written_to_its_disk(commands: Commands, web: str) -> None:
    commands.exec(web, "sh", "-c", "echo synced > /root/note; sync; echo lost > /root/note")
    commands.run("power-cut", web)
    assert state(commands, web) == "stopped"
    assert b"--memory" in commands.run("start", web, "--memory", "2G", status=2).stderr
    started = json.loads(commands.run("start", web, "--json").stdout)

    assert started["state"] == "running"
    assert commands.exec(web, "cat", "/root/note") == "synced\n"
    assert b"runs already" in commands.run("start", web, status=1).stderr


@pytest.mark.guests
def test_a_start_in_the_background_can_be_waited_for(commands: Commands, name: str) -> None:
    started = json.loads(commands.run("start", "debian-12", "--name", name, "--no-wait", "--json").stdout)
    commands.run("wait", name)

    assert started["state"] == "starting"
    assert state(commands, name) == "running"
    assert commands.exec(name, "echo", "ready") == "ready\n"


def test_a_start_in_the_background_that_fails_is_told_to_who_waits(commands: Commands, name: str) -> None:
    ended = subprocess.run(
        commands.argv("start", "debian-12", "--name", name, "--memory", "9999G", "--no-wait"),
        env=commands.environment(),
        capture_output=True,
        check=False,
    )
    # It may fail before the command has returned.
    told = ended.stderr if ended.returncode else commands.run("wait", name, status=1).stderr

    assert b"memory=" in told
    assert commands.about(name) is None
    assert b"there is no machine" in commands.run("wait", name, status=1).stderr


def test_a_run_has_the_status_of_its_command_and_leaves_nothing(commands: Commands, name: str, tmp_path: Path) -> None:
    (tmp_path / "motd").write_text("hi\n")
    words = ("run", "debian-12", "--name", name, "-e", "WHO=me", "-w", "/tmp", "sh", "-c", "pwd; echo $WHO; cat; exit 3")
    ended = commands.run(*words, stdin=b"typed\n", status=3)

    assert ended.stdout == b"/tmp\nme\ntyped\n"
    assert not (commands.root / "machines" / name).exists()


@pytest.mark.guests
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.guests)])
def test_an_interrupted_run_removes_its_machine(commands: Commands, name: str, number: int) -> None:
    with commands.begin(
        "run", "debian-12", "--name", name, "--", "sh", "-c", "echo begun; exec sleep 1000", stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        running.send_signal(number)

    assert running.returncode == 128 + number
    assert Deadline(60).poll(lambda: not (commands.root / "machines" / name).exists())


@pytest.mark.guests
def test_a_run_does_not_take_the_place_of_a_machine_of_its_name(commands: Commands, web: str) -> None:
    assert b"already" in commands.run("run", "debian-12", "--name", web, "true", status=1).stderr
    assert state(commands, web) == "running"


@pytest.mark.guests
def test_the_screen_is_saved_and_keys_are_pressed(commands: Commands, name: str, tmp_path: Path) -> None:
    commands.start(name, "--display")
    commands.run("send-keys", name, "--text", "root", "ret")
    commands.run("screenshot", name, "-o", tmp_path / "screen.png")

    assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")
    assert commands.run("screenshot", name, "-o", "-").stdout.startswith(b"\x89PNG")
    assert b"'ctrl-nosuch'" in commands.run("send-keys", name, "ctrl-nosuch", status=1).stderr


@pytest.mark.guests
def test_machines_on_one_lan_reach_each_other_by_name_from_processes_of_their_own(commands: Commands, name: str) -> None:
    other = f"{name}b"
    greets = ("bash", "-c", f"exec 3<>/dev/tcp/{other}/22; head -c 4 <&3")
    commands.start(name, f"--network={name}")
    try:
        commands.start(other, f"--network={name}")
        assert commands.exec(name, *greets) == "SSH-"
        data = os.urandom(3 << 20)
        commands.run(
            "exec", other, "-i", "--", "sh", "-c", "cat > /srv/data; systemd-run -q python3 -m http.server -d /srv 8000", stdin=data
        )
        fetch = f"import time, urllib.request as u; time.sleep(3); print(len(u.urlopen('http://{other}:8000/data', timeout=60).read()))"
        assert commands.exec(name, "python3", "-c", fetch) == f"{3 << 20}\n"
        commands.run("reboot", other)
        assert commands.exec(name, *greets) == "SSH-"
    finally:
        commands.run("rm", "--force", other)
    assert Deadline(60).poll(lambda: other not in commands.exec(name, "cat", "/etc/hosts"), every=0.5)
    commands.run("rm", "--force", name)
    assert not list((commands.root / "lans" / name).iterdir())
