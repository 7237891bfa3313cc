"""What the QEMU of this host offers, by its own account, against what its version is known for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pytest_vmbottle.backends.qemu import proof
from pytest_vmbottle.backends.qemu.features import probe_features
from pytest_vmbottle.errors import BackendUnavailable


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_what_a_qemu_says_it_offers_is_what_its_version_brought(arch: str, tmp_path: Path) -> None:
    found = shutil.which(f"qemu-system-{arch}")
    assert found, "these tests need qemu-system-x86 and qemu-system-arm"
    numbers = re.search(r"version (\d+)\.(\d+)", proof.version(Path(found)))
    assert numbers
    version = int(numbers[1]), int(numbers[2])

    dialect = probe_features(Path(found), workdir=tmp_path)

    assert dialect.sandbox
    assert dialect.readonly_ram == (version >= (8, 2))
    assert dialect.state_files == (version >= (8, 2))
    assert dialect.mapped_ram == (version >= (9, 0))
    assert dialect.exit_with_parent == (version >= (10, 2))
    assert dialect.vmgenid == (arch == "x86_64" or version >= (10, 1))


def test_a_program_that_does_not_answer_is_told_with_what_it_printed(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho a library is missing >&2\nexit 1\n")
    program.chmod(0o700)

    with pytest.raises(BackendUnavailable, match="a library is missing"):
        probe_features(program, workdir=tmp_path)
