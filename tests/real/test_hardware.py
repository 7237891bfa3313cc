"""Hosts whose hardware runs guests, which this one need not be: a QEMU stands in for theirs, takes down what it is told, and emulates.

It offers KVM and HVF, runs what is to run on them by TCG, and is slow where TCG itself is asked for. All else is as it is there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend, proof
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.doctor import State, examine
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.settings import Settings as Told

pytestmark = pytest.mark.skipif(host_arch() != "x86_64", reason="the QEMU that stands in is one for x86-64")

STAND_IN = """#!{python}
import json, os, sys

words = sys.argv[1:]
with open({record!r}, "a") as record:
    record.write(json.dumps(words) + "\\n")
if words == ["-accel", "help"]:
    print("Accelerators supported in QEMU binary:", "tcg", "kvm", "hvf", sep="\\n")
    sys.exit()
if "-accel" in words:
    accelerator, cpu = words.index("-accel") + 1, words.index("-cpu") + 1
    if words[accelerator] in ("kvm", "hvf"):
        if words[cpu] in {refused!r}:
            print("qemu: error: failed to set MSR 0x10a to 0x69", file=sys.stderr, flush=True)
            os.abort()
        words[accelerator], words[cpu] = "tcg,thread=multi,tb-size=256", "max,la57=off,erms=off,fsrm=off"
    else:
        words += ["-d", "nochain"]
os.execv({real!r}, [{real!r}, *words])
"""
Install = Callable[..., None]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """File with the stand-in's arguments, a list of words on each line."""
    return tmp_path / "record"


@pytest.fixture
def install(tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """A function that puts a stand-in for QEMU first in the search path; it aborts with the processors that are refused."""
    real = shutil.which("qemu-system-x86_64")
    assert real, "these tests need qemu-system-x86_64: sudo apt-get install qemu-system-x86"

    def install(*refused: str) -> None:
        program = tmp_path / "bin" / "qemu-system-x86_64"
        program.parent.mkdir()
        program.write_text(STAND_IN.format(python=sys.executable, record=str(record), refused=refused, real=real))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(proof, "kvm_refusal", lambda _: None)  # there is no device, or it cannot be opened, on many a host

    return install


def told(record: Path) -> list[list[str]]:
    """The accelerator and the processor that each guest was run with."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return [[line[line.index(option) + 1] for option in ("-accel", "-cpu")] for line in lines if "-cpu" in line]


def test_kvm_that_is_quicker_than_emulation_is_used_with_the_hosts_processor(install: Install, record: Path, tmp_path: Path) -> None:
    install()
    able = QemuBackend(proofs=tmp_path / "proofs").probe()

    assert (able.accelerator, able.emulated, able.pack_kind) == ("kvm", False, "template")
    assert able.reason.startswith("ran 20,000,000 function calls")
    assert told(record)[1:] == [["kvm", "host"]] * len(told(record)[1:])  # the first was TCG, to be compared with
    assert len(told(record)) > 3  # the work, a machine saved, and its clone


@pytest.mark.guests
def test_a_processor_that_kvm_aborts_on_is_tried_without_what_it_aborts_on(install: Install, record: Path, tmp_path: Path) -> None:
    install("host")
    proved = QemuBackend(proofs=tmp_path / "proofs").proof

    assert proved.accelerator.cpu == "host,arch-capabilities=off"
    assert "error: failed to set MSR" in proved.verdicts[0].evidence
    assert told(record)[1:3] == [["kvm", "host"], ["kvm", "host,arch-capabilities=off"]]
    assert ["kvm", "host"] not in told(record)[2:]


@pytest.mark.guests
def test_kvm_that_aborts_with_every_processor_gives_way_to_emulation(install: Install, tmp_path: Path) -> None:
    install("host", "host,arch-capabilities=off")
    able = QemuBackend(proofs=tmp_path / "proofs").probe()

    assert (able.accelerator, able.emulated) == ("tcg", True)
    assert able.reason.startswith("KVM runs no guest here: QEMU was ended by signal 6")


@pytest.mark.guests
def test_packs_of_kvm_are_for_this_kernel_alone_but_for_those_of_a_level(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    emulated, real = (QemuBackend(accelerator=name, proofs=tmp_path / "proofs") for name in ("tcg", "kvm"))

    def keys(**keywords: str) -> list[str]:
        spec = MachineSpec.resolve("debian-12", keywords)
        return [each.fingerprint(spec) for each in (emulated, real)]

    before, levels = keys(), keys(cpu="x86-64-v2")
    assert len({*before, *levels}) == 4
    assert keys() == before
    monkeypatch.setattr(platform, "release", lambda: "6.99.0")
    assert keys(cpu="x86-64-v2") == levels
    assert keys()[0] == before[0]
    assert keys()[1] != before[1]


@pytest.mark.guests
def test_the_doctor_says_that_kvm_is_used_and_that_a_guest_ran(install: Install, tmp_path: Path) -> None:
    install()
    found = {finding.topic: finding for finding in examine(tmp_path / "catalog", Told.read())}

    assert found["accelerator"].state is State.OK
    assert found["accelerator"].text.startswith("using KVM: a guest ran 20,000,000 function calls")


@pytest.fixture
def catalog(tmp_path: Path, vm_catalog: Catalog) -> Catalog:
    """A catalog with nothing but the images of the run's own."""
    mine = Catalog(tmp_path / "catalog")
    (mine.root / "images").symlink_to(vm_catalog.images)
    return mine


@pytest.fixture
def provisioner(install: Install, catalog: Catalog, vm_catalog: Catalog) -> Iterator[Provisioner]:
    # The stand-in is no quicker than emulation, and has the patience of real hardware.
    usual = Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings())
    usual.pack(MachineSpec.resolve("debian-12", {}))  # so that there is an image
    usual.close()
    install()
    made = Provisioner(catalog, QemuBackend(proofs=catalog.proofs), name="qemu", settings=Settings(timeout_factor=10))
    yield made
    made.close()


@pytest.mark.guests
def test_a_machine_is_bottled_and_poured_on_kvm(provisioner: Provisioner, record: Path) -> None:
    spec = MachineSpec.resolve("debian-12", {})
    with provisioner.machine(spec) as machine:
        assert machine.exec(["uname", "-s"]).stdout == "Linux\n"
        words = json.loads(record.read_text().splitlines()[-1])

    assert ("-incoming" in words, words[words.index("-accel") + 1], words[words.index("-cpu") + 1]) == (True, "kvm", "host")
    assert provisioner.tally.restored == 1
    assert provisioner.pack(spec).manifest.backend.endswith(" kvm")


@pytest.mark.guests
def test_hvf_is_told_the_hosts_processor(install: Install, record: Path, tmp_path: Path) -> None:
    install()
    able = QemuBackend(accelerator="hvf", proofs=tmp_path / "proofs").probe()

    assert (able.accelerator, able.emulated) == ("hvf", False)
    assert told(record)[1:] == [["hvf", "host"]] * len(told(record)[1:])


@pytest.mark.guests
def test_a_mac_tries_hvf_and_not_kvm(install: Install, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr(proof, "sys", SimpleNamespace(platform="darwin"))
    able = QemuBackend(proofs=tmp_path / "proofs").probe()

    assert able.accelerator == "hvf"
    assert not [words for words in told(record) if words[0] == "kvm"]
