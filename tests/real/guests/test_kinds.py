"""The kinds of packs that keep RAM: each can be forced, and each gives the same machines."""

from __future__ import annotations

import pytest

from pytest_vmbottle.spec.pack_kind import PackKind

SCRIPT = "echo lasting > /root/which; echo kept > /dev/shm/which"
TESTS = f"""
import time
import pytest

pytestmark = pytest.mark.vm("debian-12", run=[{SCRIPT!r}])

def test_the_disk_is_as_it_was_prepared_and_ram_too(vm):
    assert vm.path("/root/which").read_text() == "lasting\\n"
    assert vm.path("/dev/shm/which").read_text() == "kept\\n"
    vm.path("/root/which").write_text("changed")
    vm.path("/dev/shm/mine").write_text("changed")
    vm.exec("sync")

def test_no_other_test_has_changed_it_and_it_is_awake(vm):
    assert vm.path("/root/which").read_text() == "lasting\\n"
    assert not vm.path("/dev/shm/mine").exists()
    assert abs(float(vm.exec(["date", "+%s"]).stdout) - time.time()) < 5
    assert vm.exec(["cat"], input="in and out").stdout == "in and out"
"""


# Packs of disks are in test_aarch64.py, with a guest that boots in seconds.
@pytest.mark.parametrize("kind", [PackKind.TEMPLATE, PackKind.STREAM])
def test_each_kind_can_be_forced_and_gives_the_same_machines(kind: PackKind, inner: pytest.Pytester) -> None:
    inner.makepyfile(TESTS)

    result = inner.runpytest_subprocess(f"--vm-pack={kind}", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"*, {kind} packs, *"])
    result.stdout.fnmatch_lines(["*vmbottle: 2 machines restored, *"])
