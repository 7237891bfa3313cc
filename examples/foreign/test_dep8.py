"""DEP-8 tests of packages of Debian, each in a machine of its own: a clone of one that has the packages that the test needs."""

from __future__ import annotations

import pytest

from examples.foreign.dep8 import read_tests
from examples.foreign.sources import Sources
from pytest_vmbottle import MachineFactory

PACKAGES = {"gzip": 1, "sed": 1, "tmux": 2, "hello": 2, "memcached": 2}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tests_of_a_package_pass(package: str, sources: Sources, vm_factory: MachineFactory, subtests: pytest.Subtests) -> None:
    source = sources.unpacked(package)
    found = list(read_tests(source))
    assert len(found) == PACKAGES[package]
    for number, test in enumerate(found):
        with subtests.test(test.name):
            test.run(vm_factory("debian-12", name=f"vm{number}", network=True, packages=test.depends), source)
