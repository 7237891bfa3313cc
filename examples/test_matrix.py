"""One test over two sources: an installer has to work on a fresh system and on one that has the earlier version."""

from __future__ import annotations

import pytest

from pytest_vmbottle import Machine, layer

INSTALL = """
mkdir -p /opt/app
echo 2 > /opt/app/version
[ -e /etc/app.conf ] || echo 'colour = blue' > /etc/app.conf
ln -sfn /opt/app/version /usr/local/share/app-version
"""


@layer("debian-12")
def version_1(vm: Machine) -> None:
    vm.path("/opt/app").mkdir()
    vm.path("/opt/app/version").write_text("1\n")
    vm.path("/etc/app.conf").write_text("colour = green\n")


pytestmark = pytest.mark.vm(["debian-12", version_1])


def test_installer_ends_with_version_2(vm: Machine) -> None:
    vm.exec(INSTALL)
    assert vm.path("/usr/local/share/app-version").read_text() == "2\n"


def test_installing_twice_changes_nothing_more(vm: Machine) -> None:
    vm.exec(INSTALL)
    settings = vm.path("/etc/app.conf").read_text()
    vm.exec(INSTALL)
    assert vm.path("/etc/app.conf").read_text() == settings


@pytest.mark.vm(source=version_1)  # the closest mark wins
def test_upgrade_keeps_the_settings(vm: Machine) -> None:
    vm.exec(INSTALL)
    assert vm.path("/etc/app.conf").read_text() == "colour = green\n"
