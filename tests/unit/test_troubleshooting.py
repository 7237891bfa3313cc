"""The page of error messages: a heading for each class, messages that the package has, and errors that name it."""

from __future__ import annotations

import inspect
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

import pytest_vmbottle
from pytest_vmbottle import CommandFailed, MachineTimeout, Result
from pytest_vmbottle.channels.ssh import HostKeyMismatch
from pytest_vmbottle.plugin.advice import _PAGE, advise

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
OF_OTHERS = {"--vm-hosts", "Cannot allocate memory", "apt-get", "command not found", "curl"}
"""Texts that are no messages of this package."""
COMPOSED = {
    "...toml: images.x.y: is not known": "is not known",
    "LEAK: ...": "LEAK",
    "memory=... is more than the memory budget of ...": "the memory budget of",
    "memory=... is more than this host's ...": "this host's",
    "mmdebstrap is missing": "missing",
    "takes ...": "takes",
}
"""Messages that are put together, and what of them stands in one piece."""


@cache
def sources() -> str:
    """The package's texts, with those in one that are written in several lines, and a blank for what is put in."""
    text = "\n".join(path.read_text() for path in Path(pytest_vmbottle.__file__).parent.rglob("*.py"))
    joined = re.sub(r"\"\s*\n\s*[rf]{0,2}\"", "", text)
    return text + re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "\0", joined)


def messages() -> list[str]:
    rows = re.findall(r"^\| (.*?) \| ", PAGE.read_text(), re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row) if code not in OF_OTHERS]


def fragments(message: str) -> list[str]:
    """The parts of a message between what differs from case to case."""
    if message in COMPOSED:
        return [COMPOSED[message]]
    parts = re.split(r"\.\.\.|\bx\b|\bN\b|\d[\d.]*|qemu-system-x86_64|/dev/kvm|~/\.cache|\bKVM\b|['()\[\]:]", message)
    return [part.strip() for part in parts if len(part.split()) > 1]


@pytest.mark.parametrize("message", messages())
def test_a_message_on_the_page_is_one_of_the_package(message: str) -> None:
    text = sources()

    assert fragments(message)
    assert any(fragment in text for fragment in fragments(message)), fragments(message)


def test_errors_name_a_page_of_the_site_that_has_a_heading_for_each_class() -> None:
    headings = set(re.findall(r"^## (\w+)$", PAGE.read_text(), re.MULTILINE))
    public = ((name, getattr(pytest_vmbottle, name)) for name in pytest_vmbottle.__all__)
    classes = {name for name, each in public if inspect.isclass(each) and issubclass(each, BaseException)}

    assert len(classes) > 10
    assert classes - headings == set()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MachineTimeout("late"), f"help: {_PAGE}#machinetimeout"),
        (HostKeyMismatch("another"), f"help: {_PAGE}#machineerror"),
        (CommandFailed(Result(argv=("false",), returncode=1, stdout="", stderr="", duration=0.1)), ""),
        (ValueError("none of ours"), ""),
    ],
    ids=["public", "derived", "command", "foreign"],
)
def test_an_error_names_the_place_of_its_public_class_once(error: Exception, told: str) -> None:
    assert [advise(error), advise(error)] == [told, told]
    assert getattr(error, "__notes__", []) == [told] * bool(told)


def test_the_address_is_that_of_the_site() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]

    assert f"{urls['Documentation']}troubleshooting/" == _PAGE
