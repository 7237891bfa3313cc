"""Completion in shells: names of what there is, and no word about what goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytest_vmbottle.cli import main

CONFTEST = """
from pytest_vmbottle import layer

raise SystemExit("a conftest is not run for completion")

@layer("debian-12", memory="1G")
def web(vm):
    pass

# @layer in a comment
@layer(
    web,
    packages=["nginx"],
)
@other
def shop(vm):
    pass
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalog with a machine that has a snapshot, a capsule, an image and two packs, of which one is damaged."""
    root = tmp_path / "catalog"
    (root / "machines" / "web" / "snapshots" / "clean").mkdir(parents=True)
    (root / "machines" / ".web-1f").mkdir()
    (root / "capsules" / "test_it-py-test_web").mkdir(parents=True)
    for key, text in (("a1" * 32, '{"name": "shop"}'), ("b2" * 32, "{")):
        (root / "packs" / key).mkdir(parents=True)
        (root / "packs" / key / "pack.json").write_text(text)
    (root / "images" / "names").mkdir(parents=True)
    (root / "images" / "names" / "mine.json").write_text("{}")
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(root))
    (tmp_path / "project" / "tests").mkdir(parents=True)
    (tmp_path / "project" / "tests" / "conftest.py").write_text(CONFTEST)
    monkeypatch.chdir(tmp_path / "project")
    return root


def completed(words: str) -> list[str]:
    """Complete the last word of a line, and return kinds and texts as the shell gets them."""
    variables = {"_VMBOTTLE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(main, prog_name="vmbottle", env=variables)
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("vmbottle mac", ["plain,machine"]),
        (
            "vmbottle pack ",
            [f"plain,{name}" for name in ("build", "export", "import", "push", "pull", "ls", "show", "verify", "rm", "prune")],
        ),
        ("vmbottle machine po", ["plain,power-cut"]),
        ("vmbottle machine exec ", ["plain,web"]),
        ("vmbottle machine stop web w", ["plain,web"]),
        ("vmbottle machine stop x", []),
        ("vmbottle machine restore web ", ["plain,clean"]),
        ("vmbottle machine start m", ["plain,mine"]),
        ("vmbottle machine start w", ["plain,web", "plain,web@clean"]),
        ("vmbottle machine start tests/", ["plain,tests/conftest.py::web", "plain,tests/conftest.py::shop"]),
        ("vmbottle machine start pack:", ["plain,pack:a1a1a1a1a1a1"]),
        ("vmbottle machine start debian-12 --acc", ["plain,--accel"]),
        ("vmbottle machine start ./", ["file,./"]),
        ("vmbottle machine run de", ["plain,debian-12", "plain,debian-13"]),
        ("vmbottle capsule show te", ["plain,test_it-py-test_web"]),
        ("vmbottle bisect te", ["plain,test_it-py-test_web", "plain,tests/conftest.py::web", "plain,tests/conftest.py::shop"]),
        ("vmbottle bisect w", ["file,w"]),
        ("vmbottle machine cp w", ["plain,web:/"]),
        ("vmbottle machine cp site web", ["plain,web:/"]),
        ("vmbottle machine cp ./s", ["file,./s"]),
        ("vmbottle image rm ", ["plain,mine"]),
        ("vmbottle image build debian-13", ["plain,debian-13"]),
        ("vmbottle image pull fed", ["plain,fedora-43", "plain,fedora-44"]),
        ("vmbottle pack show ", ["plain,a1a1a1a1a1a1"]),
        ("vmbottle completion ", ["plain,bash", "plain,zsh", "plain,fish"]),
    ],
)
def test_words_are_completed_by_what_there_is(words: str, found: list[str]) -> None:
    assert completed(words) == found


def test_a_catalog_that_is_not_there_or_cannot_be_read_completes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()

    for root in (tmp_path / "none", tmp_path / "file", Path("/dev/null/x")):
        monkeypatch.setenv("VMBOTTLE_CATALOG", str(root))
        assert completed("vmbottle machine exec ") == []
        assert completed("vmbottle pack rm ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_the_command_and_is_valid_where_the_shell_is(shell: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["completion", shell], prog_name="vmbottle")

    assert result.exit_code == 0
    assert f"_VMBOTTLE_COMPLETE={shell}_complete" in result.stdout
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(result.stdout)
        subprocess.run([program, "-n", tmp_path / "script"], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
def test_bash_completes_a_word_with_a_colon_as_one(root: Path, tmp_path: Path) -> None:
    script = CliRunner().invoke(main, ["completion", "bash"], prog_name="vmbottle").stdout
    program = tmp_path / "bin" / "vmbottle"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom pytest_vmbottle.cli import main\nmain(prog_name='vmbottle')\n")
    program.chmod(0o755)
    asked = (
        f"{script}\nCOMP_WORDS=(vmbottle machine start pack:a); COMP_CWORD=3\n"
        '_vmbottle_completion vmbottle; echo "${COMPREPLY[@]} [$COMP_WORDBREAKS]"'
    )
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "VMBOTTLE_CATALOG": str(root)}
    # Interactive, as a shell is that completes: others have no word breaks.
    ended = subprocess.run(["bash", "--norc", "-c", asked], env=environment, capture_output=True, text=True, check=True)

    words, _, breaks = ended.stdout.partition(" [")
    assert words == "pack:a1a1a1a1a1a1"
    assert not {":", "@"} & set(breaks)
