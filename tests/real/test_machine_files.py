"""`vmbottle machine cp`, `read`, `search` and the like: files of a machine by hand."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.catalog.catalog import Catalog
from tests.real.test_machine_commands import Commands

if TYPE_CHECKING:
    from tests.real.conftest import Person

pytestmark = pytest.mark.guests


@pytest.fixture(scope="module")
def commands(vm_catalog: Catalog) -> Commands:
    return Commands(vm_catalog.root)


@pytest.fixture(scope="module")
def web(commands: Commands) -> Iterator[str]:
    """A machine that the tests of this file use."""
    name = f"files{os.getpid()}"
    commands.start(name)
    yield name
    commands.run("rm", "--force", name)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a file, a folder in it, and a link."""
    site = tmp_path / "site"
    (site / "img").mkdir(parents=True)
    (site / "index.html").write_text("hello\n")
    (site / "img" / "logo").write_text("red\n")
    (site / "latest").symlink_to("index.html")
    return site


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_slash_at_the_end_of_the_source_is_the_contents_of_the_folder_both_ways(
    commands: Commands, web: str, site: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # over what is there already
        commands.run("cp", f"{site}/", f"{web}:/srv/deep/www")
    commands.run("cp", site, f"{web}:/srv/deep/www")
    found = commands.exec(web, "find", "/srv/deep/www", "-mindepth", "1", "-printf", r"%P\n").split()
    for _ in range(2):
        commands.run("cp", f"{web}:/srv/deep/www/", tmp_path / "back")

    tree = {"index.html", "img", "img/logo", "latest"}
    assert set(found) == tree | {"site"} | {f"site/{name}" for name in tree}
    assert below(tmp_path / "back") == set(found)
    assert (tmp_path / "back" / "latest").readlink() == Path("index.html")


def test_a_folder_of_the_guest_that_is_not_there_makes_none_here(commands: Commands, web: str, tmp_path: Path) -> None:
    assert b"No such file" in commands.run("cp", f"{web}:/nowhere/", tmp_path / "back", status=1).stderr
    assert not (tmp_path / "back").exists()


def test_a_dash_is_standard_input_or_output(commands: Commands, web: str) -> None:
    data = os.urandom(300_000)
    commands.run("cp", "-", f"{web}:/tmp/data", stdin=data)

    assert commands.run("cp", f"{web}:/tmp/data", "-").stdout == data
    assert commands.run("read", web, "/tmp/data").stdout == data
    assert b"/tmp/nosuch" in commands.run("read", web, "/tmp/nosuch", status=1).stderr
    assert b"begins with a slash" in commands.run("read", web, "tmp/data", status=2).stderr


def test_a_terminal_gets_no_control_characters_and_no_archive(commands: Commands, web: str, person: Person) -> None:
    commands.run("cp", "-", f"{web}:/tmp/evil", stdin=b"a \x1b[31mred\n")
    read = subprocess.Popen(commands.argv("read", web, "/tmp/evil"), env=commands.environment(), stdout=person.terminal)
    person.sees(r"a \\x1b\[31mred")
    assert person.watches(read) == 0
    refused = subprocess.run(
        commands.argv("archive", web, "/etc", "-o", "-"),
        env=commands.environment(),
        stdout=person.terminal,
        stderr=subprocess.PIPE,
        check=False,
    )

    assert refused.returncode == 1
    assert b"is a terminal" in refused.stderr


def test_folders_are_listed_and_searched(commands: Commands, web: str, site: Path) -> None:
    commands.run("upload", web, "/srv/listed", f"{site}/")
    listed = json.loads(commands.run("ls-dir", web, "/srv/listed", "--json").stdout)
    found = json.loads(commands.run("search", web, "l+o", "/srv/listed", "-E", "--include", "*.html", "--json").stdout)

    assert {(entry["path"], entry["type"]) for entry in listed} == {
        ("/srv/listed/img", "dir"),
        ("/srv/listed/index.html", "file"),
        ("/srv/listed/latest", "symlink"),
    }
    assert b"/srv/listed/img/logo" in commands.run("ls-dir", web, "/srv/listed", "-R").stdout
    assert found == {"matches": [{"path": "/srv/listed/index.html", "line": 1, "text": "hello"}], "truncated": False, "timed_out": False}
    assert commands.run("search", web, "-i", "RED", "/srv/listed").stdout == b"/srv/listed/img/logo:1:red\n"
    assert commands.run("search", web, "blue", "/srv/listed", status=1).stdout == b""
    assert b"regular expression" in commands.run("search", web, "-E", "(", "/srv/listed", status=1).stderr


def test_an_upload_goes_into_its_folder_and_replaces_what_was_there_if_asked(
    commands: Commands, web: str, site: Path, tmp_path: Path
) -> None:
    (tmp_path / "motd").write_text("hi\n")
    commands.run("upload", web, "/srv/up/here", site, tmp_path / "motd")
    assert commands.exec(web, "ls", "/srv/up/here").split() == ["motd", "site"]
    commands.run("upload", web, "/srv/up/here", "--clean", f"{site}/")

    assert commands.exec(web, "ls", "/srv/up/here").split() == ["img", "index.html", "latest"]
    assert b"called motd" in commands.run("upload", web, "/srv/up", tmp_path / "motd", f"{tmp_path}/", status=2).stderr


def test_a_folder_is_packed_into_a_file_or_a_pipe(commands: Commands, web: str, site: Path, tmp_path: Path) -> None:
    commands.run("cp", site, f"{web}:/opt")
    commands.run("archive", web, "/opt/site", "-o", tmp_path / "site.zip")
    piped = commands.run("archive", web, "/opt/site", "-o", "-").stdout

    with zipfile.ZipFile(tmp_path / "site.zip") as archive:
        assert archive.read("site/index.html") == b"hello\n"
    with tarfile.open(fileobj=io.BytesIO(piped)) as archive:
        assert "site/img/logo" in archive.getnames()
    assert b"/opt/none" in commands.run("archive", web, "/opt/none", "-o", tmp_path / "none.zip", status=1).stderr
    assert not (tmp_path / "none.zip").exists()
