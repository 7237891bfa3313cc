"""Other hosts than this one: what the same code does where the QEMU, the rights or the room are others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.packs import scan
from pytest_vmbottle.provision import Provisioner, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.catalog import Catalog


@pytest.fixture
def provisioner(vm_catalog: Catalog) -> Iterator[Provisioner]:
    made = Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings())
    yield made
    made.close()


def test_machines_are_poured_from_packs_of_this_very_qemu(provisioner: Provisioner, vm_catalog: Catalog) -> None:
    """A catalog may hold what other QEMUs have left there: in Debian 13's root it does (see .ci/debian13)."""
    spec = MachineSpec.resolve("debian-12", {})
    chosen = provisioner.pack(spec)
    able = provisioner.capabilities
    with provisioner.machine(spec) as machine:
        assert machine.exec(["echo", "poured"]).stdout == "poured\n"
    assert provisioner.tally.booted in (0, 1)  # 1 if the pack was not there yet
    assert provisioner.tally.poured == 1

    others = [pack for pack in scan(vm_catalog.packs)[0] if pack.manifest.backend != f"qemu {able.version} {able.accelerator}"]
    assert chosen.manifest.backend == f"qemu {able.version} {able.accelerator}"
    assert chosen.key not in {pack.key for pack in others}
