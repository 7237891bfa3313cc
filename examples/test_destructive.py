"""One test destroys its machine; the others do not notice, because each has a clone of its own."""

from __future__ import annotations

import pytest

from pytest_vmbottle import Machine

pytestmark = pytest.mark.vm("debian-12")

# Nothing in /usr can be used to look at what is left, and there are no programs elsewhere: /bin and /lib are links into /usr. So two
# programs are put into a lifeboat first, with the libraries and the loader that they need.
LIFEBOAT = """
mkdir /lifeboat
cp /usr/bin/ls /usr/bin/cat $(ldd /usr/bin/ls /usr/bin/cat | grep -o '/lib[^ ]*' | sort -u) /lifeboat
"""


def test_system_is_deleted_while_it_runs(vm: Machine) -> None:
    vm.exec(LIFEBOAT)
    vm.exec(["rm", "-rf", "--no-preserve-root", "/usr"])
    assert vm.exec(["ls", "/"], check=False).returncode == 127  # there is no such program any more

    def lifeboat(program: str, path: str) -> str:
        loader = "/lifeboat/ld-linux-x86-64.so.2"
        return vm.exec([loader, "--library-path", "/lifeboat", f"/lifeboat/{program}", path]).stdout

    assert "usr" not in lifeboat("ls", "/").split()
    assert lifeboat("cat", "/etc/debian_version").startswith("12.")  # what was not deleted is still there
    assert lifeboat("cat", "/proc/1/comm") == "systemd\n"  # and what was in memory still runs


def test_neighbour_has_a_whole_system(vm: Machine) -> None:
    assert vm.exec(["ls", "/usr/bin/python3"]).ok
    assert not vm.path("/lifeboat").exists()
    vm.exec(["dpkg", "--verify", "coreutils"])  # compares each file with its checksum
