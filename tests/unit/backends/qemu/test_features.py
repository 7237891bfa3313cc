"""What a migration is told, by what comes out of it and what QEMU offers."""

from __future__ import annotations

import attrs
import pytest

from pytest_vmbottle.backends.qemu.features import Features
from pytest_vmbottle.spec.pack_kind import PackKind

OLD = Features(sandbox=True, exit_with_parent=False, readonly_ram=False, state_files=False, mapped_ram=False, vmgenid=True)
NEW = attrs.evolve(OLD, readonly_ram=True, state_files=True, mapped_ram=True)


@pytest.mark.parametrize("dialect", [OLD, NEW])
def test_ram_stays_in_its_file_for_a_template_only(dialect: Features) -> None:
    assert dialect.capabilities(PackKind.TEMPLATE)["x-ignore-shared"]
    assert not dialect.capabilities(PackKind.STREAM)["x-ignore-shared"]


def test_a_stream_is_mapped_and_shared_among_threads_where_qemu_can() -> None:
    assert NEW.capabilities(PackKind.STREAM).items() >= {"mapped-ram": True, "multifd": True}.items()
    assert not {"mapped-ram", "multifd"} & OLD.capabilities(PackKind.STREAM).keys()


def test_a_template_is_never_mapped_because_older_versions_crash_on_both() -> None:
    assert NEW.capabilities(PackKind.TEMPLATE).items() >= {"mapped-ram": False, "multifd": False}.items()
