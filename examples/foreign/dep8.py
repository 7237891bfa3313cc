"""A runner for DEP-8 tests (https://dep-team.pages.debian.net/deps/dep8/), on machines."""

from __future__ import annotations

import email
import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle import Machine


@attrs.frozen
class Dep8Test:
    """A test: the command that runs it in the source's folder, the packages that it depends on, and its restrictions."""

    name: str
    command: str
    depends: tuple[str, ...]
    restrictions: frozenset[str]

    def run(self, vm: Machine, source: Path) -> None:
        """Run it in a machine that has these packages, and judge it."""
        vm.cp(f"{source}/", vm.path("/usr/src/tested"))
        vm.exec("mkdir -m 1777 /tmp/work /tmp/artifacts")
        env = {"AUTOPKGTEST_TMP": "/tmp/work", "AUTOPKGTEST_ARTIFACTS": "/tmp/artifacts", "DEBIAN_FRONTEND": "noninteractive"}
        result = vm.exec(self.command, check=False, cwd="/usr/src/tested", env=env, timeout=600)
        if result.returncode == 77 and "skippable" in self.restrictions:
            pytest.skip(result.stdout)
        result.check()
        assert "allow-stderr" in self.restrictions or not result.stderr, result


def read_tests(source: Path) -> Iterator[Dep8Test]:
    """Return the tests of an unpacked source package."""
    control = (source / "debian/control").read_text()
    binaries = ", ".join(re.findall(r"^Package: (\S+)$", control, re.MULTILINE))
    for stanza in re.split(r"\n{2,}", (source / "debian/tests/control").read_text().strip()):
        fields = {key.lower(): value for key, value in email.message_from_string(stanza).items()}
        restrictions = frozenset(re.split(r"[,\s]+", fields.get("restrictions", "")))
        depends = tuple(_first(each) for each in fields.get("depends", "@").replace("@", binaries).split(",") if each.strip())
        folder = fields.get("tests-directory", "debian/tests")
        if command := fields.get("test-command"):
            yield Dep8Test(command, command, depends, restrictions)
        for name in fields.get("tests", "").replace(",", " ").split():
            yield Dep8Test(name, f"chmod +x {folder}/{name}; {folder}/{name}", depends, restrictions)


def _first(dependency: str) -> str:
    return re.split(r"[|(\[<]", dependency)[0].strip()
