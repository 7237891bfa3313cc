"""A Debian package built in the test, installed, used, and removed again: files, scripts and what stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_vmbottle import Machine

CONTROL = """\
Package: greeter
Version: 1.0
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: greets, as it was told to in its configuration
"""
PROGRAM = '#!/bin/sh\necho "$(cat /etc/greeter.conf), $1"\n'
CREATE_USER = "#!/bin/sh\nset -e\nid greeter >/dev/null 2>&1 || useradd --system greeter\n"

pytestmark = pytest.mark.vm("debian-12")


@pytest.fixture
def package(vm: Machine, tmp_path: Path) -> str:
    """The path in the guest of a package that was just built there from files of ours."""
    files = {"DEBIAN/control": CONTROL, "DEBIAN/conffiles": "/etc/greeter.conf\n", "etc/greeter.conf": "Hello"}
    programs = {"DEBIAN/postinst": CREATE_USER, "usr/bin/greeter": PROGRAM}
    for name, content in {**files, **programs}.items():
        path = tmp_path / "greeter" / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755 if name in programs else 0o644)
    vm.cp(tmp_path / "greeter", vm.path("/root/greeter"))
    vm.exec(["dpkg-deb", "--build", "--root-owner-group", "/root/greeter", "/root/greeter.deb"])
    return "/root/greeter.deb"


def test_installed_program_works(vm: Machine, package: str) -> None:
    vm.exec(["dpkg", "--install", package])
    assert vm.exec(["greeter", "world"]).stdout == "Hello, world\n"
    assert vm.exec(["id", "--user", "--name", "greeter"]).stdout == "greeter\n"


def test_removal_keeps_the_changed_configuration(vm: Machine, package: str) -> None:
    vm.exec(["dpkg", "--install", package])
    vm.path("/etc/greeter.conf").write_text("Moin")
    vm.exec(["dpkg", "--remove", "greeter"])
    assert not vm.path("/usr/bin/greeter").exists()
    assert vm.path("/etc/greeter.conf").read_text() == "Moin"
    vm.exec(["dpkg", "--purge", "greeter"])
    assert not vm.path("/etc/greeter.conf").exists()
