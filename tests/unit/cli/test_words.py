"""Calls that end with a command of the guest, and the options of a new machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from pytest_vmbottle.cli import main
from pytest_vmbottle.cli.machine_commands import execute
from pytest_vmbottle.cli.options import KEYWORDS, WITHOUT_OPTION, NewMachine, machine_options
from pytest_vmbottle.settings import SETTINGS
from pytest_vmbottle.spec import MachineKeywords
from pytest_vmbottle.standalone.orders import new_order


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting.env, raising=False)


def parsed(command: click.Command, words: str) -> Mapping[str, Any]:
    """The parameters of a call that is not run."""
    return command.make_context("command", words.split()).params


@pytest.mark.parametrize(
    ("words", "command", "options"),
    [
        ("web ls -la", "ls -la", {}),
        ("web -- ls -la", "ls -la", {}),
        ("-u nobody web ls -u root", "ls -u root", {"user": "nobody"}),
        ("web -u nobody -w /tmp -- ls --timeout 3", "ls --timeout 3", {"user": "nobody", "cwd": "/tmp"}),
        ("-u nobody web --timeout=2 ls", "ls", {"user": "nobody", "timeout": 2.0}),
        ("-it web top", "top", {"interactive": True, "tty": True}),
        ("-itu nobody web top -b", "top -b", {"interactive": True, "tty": True, "user": "nobody"}),
        ("-itunobody web top -b", "top -b", {"interactive": True, "tty": True, "user": "nobody"}),
        ("web env -- -x", "env -- -x", {}),
        ("-- web ls -- -la", "ls -- -la", {}),
        ("web -e A=1 -e B=-- cat -", "cat -", {"env": {"A": "1", "B": "--"}}),
    ],
)
def test_the_first_word_after_the_name_begins_the_command_and_no_option_of_it_is_ours(
    words: str, command: str, options: dict[str, Any]
) -> None:
    found = parsed(execute, words)

    assert (found["name"], " ".join(found["words"])) == ("web", command)
    assert {key: found[key] for key in options} == options


@pytest.mark.parametrize(("words", "told"), [("", "NAME"), ("web", "COMMAND"), ("web --nosuch ls", "--nosuch"), ("web -u", "-u")])
def test_a_call_without_a_part_or_with_an_unknown_option_is_refused(words: str, told: str) -> None:
    result = CliRunner().invoke(main, ["machine", "exec", *words.split()])

    assert result.exit_code == 2
    assert told in result.stderr


# -- a new machine -----------------------------------------------------------------------------------------------------------------------


@click.command(cls=NewMachine)
@click.argument("source")
@machine_options
def new(*, source: str, keywords: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Shows what the options came to."""
    click.echo(repr((source, keywords, dict(settings))))


def given(*words: str, stdin: str = "") -> Any:
    result = CliRunner().invoke(new, ["debian-12", *words], input=stdin)
    assert result.exit_code == 0, result.output
    return eval(result.stdout)


def test_every_keyword_of_the_mark_has_an_option_or_a_reason_for_none() -> None:
    assert set(MachineKeywords.__annotations__) == {*KEYWORDS, *WITHOUT_OPTION}
    assert not KEYWORDS.keys() & WITHOUT_OPTION.keys()
    assert {parameter.name for parameter in new.params} == {
        "source",
        *KEYWORDS,
        *(setting.key for setting in SETTINGS if not setting.tests_only),
    }


def test_what_is_not_given_is_left_to_the_layers_and_to_the_defaults() -> None:
    assert given() == ("debian-12", {}, {})


def test_options_come_as_the_keywords_that_json_can_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "motd").write_text("hello")
    (tmp_path / "user-data").write_text("#cloud-config\n")
    words = "--cpus 2 --memory 2G --display --port 80 -p 8080:81 --packages nginx,curl --package jq --file /etc/motd=motd --boot"
    _, keywords, settings = given(
        *words.split(), "--run", "id; true", "--run", "ls", "-e", "A=b=c", "--user-data", "user-data", "--backend", "qemu"
    )

    assert keywords == {
        "cpus": 2,
        "memory": "2G",
        "display": True,
        "ports": [80, [81, 8080]],
        "packages": ["nginx", "curl", "jq"],
        "files": {"/etc/motd": {"host": str(tmp_path / "motd")}},
        "fresh": "boot",
        "run": ["id; true", "ls"],
        "env": {"A": "b=c"},
        "user_data": "#cloud-config\n",
        "backend": "qemu",
    }
    assert settings == {"backend": "qemu"}


def test_the_keywords_of_all_options_make_an_order(tmp_path: Path) -> None:
    (tmp_path / "motd").write_text("hello")
    _, keywords, settings = given("--port", "8080:80", "--file", f"/etc/motd={tmp_path}/motd", "--packages", "jq", "--panic", "expected")
    order = new_order(
        tmp_path / "machines", catalog=tmp_path, source="debian-12", name=None, keywords=keywords, settings=settings, folder=tmp_path
    )

    assert order.facts["keywords"].items() >= keywords.items()
    assert not (tmp_path / "machines").exists()


def test_user_data_can_come_from_standard_input() -> None:
    assert given("--user-data", "-", stdin="#!/bin/sh\n")[1] == {"user_data": "#!/bin/sh\n"}


@pytest.mark.parametrize(
    ("words", "network"),
    [
        ("--network debian-12", True),
        ("debian-12 --network", True),
        ("debian-12 --network --cpus 2", True),
        ("--network 10.0.0.0/8 debian-12", ["10.0.0.0/8"]),
        ("debian-12 --network=10.0.0.0/8,192.168.0.0/16", ["10.0.0.0/8", "192.168.0.0/16"]),
        ("--network lan debian-12", "lan"),
        ("--network=backend debian-12", "backend"),
    ],
)
def test_the_network_is_an_option_alone_or_with_what_may_be_reached(words: str, network: object) -> None:
    result = CliRunner().invoke(new, words.split())

    assert result.exit_code == 0, result.output
    source, keywords, _ = eval(result.stdout)
    assert (source, keywords["network"]) == ("debian-12", network)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--network=no,10.0.0.0/8", "--network"),
        ("--network=10.0.0.0/99", "--network"),
        ("--port 0", "'0'"),
        ("--port 80:90:70", "'80:90:70'"),
        ("--port web", "'web'"),
        ("--file /etc/motd", "'/etc/motd'"),
        ("--file /etc/motd=nosuch", "there is no file"),
        ("--memory 1M", "--memory: memory='1M': is less than 16 MiB"),
        ("--cpus 0", "--cpus"),
        ("--name a.b", "--name"),
        ("--user-data nosuch", "nosuch"),
    ],
)
def test_an_option_that_cannot_be_is_told_with_what_it_takes_before_anything_is_made(words: str, told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "none"), "machine", "start", "debian-12", *words.split()])

    assert result.exit_code == 2
    assert told in result.stderr
    assert "vm(source" not in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_run_without_a_command_and_without_a_terminal_is_a_wrong_call(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "none"), "machine", "run", "debian-12"])

    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
