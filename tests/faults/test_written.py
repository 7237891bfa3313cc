"""What is written to the catalog while writers are killed, disks are full, and calls fail."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle import CatalogError, MachineSpec, VMBottleError
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.host import records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.testing import FakeBackend

Rounds = Callable[[str, int], range]

WRITE = """
import sys
from pathlib import Path
from pytest_vmbottle.host import records
path = Path(sys.argv[1]) / "proofs" / "record.json"
print("began", flush=True)
for number in range(10 ** 9):
    records.write(path, {"number": number, "padding": "x" * (number % 5000)})
"""


def test_no_record_is_half_written_by_killed_writers_and_what_they_left_is_swept(
    root: Path, catalog: Catalog, rounds: Rounds, record_property: Callable[[str, object], None]
) -> None:
    path = root / "proofs" / "record.json"
    path.parent.mkdir()
    records.write(path, {"number": -1})
    corrupt = 0
    for _ in rounds("B10", 4):
        with subprocess.Popen([sys.executable, "-c", WRITE, str(root)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            Deadline(random.uniform(0.001, 0.03)).poll(lambda: False, every=0.001)
            writer.send_signal(signal.SIGKILL)
        try:
            assert records.read(path).keys() <= {"number", "padding"}
        except ValueError:
            corrupt += 1
    temporary = list(path.parent.glob(".*"))
    record_property("B10", f"{corrupt} corrupt records and {len(temporary)} temporary files after {len(rounds('B10', 4))} kills")
    assert corrupt == 0
    for each in temporary:
        os.utime(each, (1, 1))
    catalog.gc()
    assert list(path.parent.glob(".*")) == []


# -- calls that fail ---------------------------------------------------------------------------------------------------------------------

CALLS = ("open", "fsync", "mkdir", "rename", "replace", "posix_fallocate", "ftruncate")


@contextmanager
def failing(nth: int, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Has the nth of all calls that write fail, by this error number; gives how many there were."""
    count = 0

    def wrap(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal count
            writes = name != "open" or args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            if writes:
                count += 1
                if count == nth:
                    raise OSError(number, os.strerror(number), str(args[0]))
            return real(*args, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(getattr(os, name), name))
        yield lambda: count


NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_a_record_is_as_it_was_whichever_call_of_its_writing_fails(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "record.json"
    root.mkdir()
    records.write(path, {"age": "old"})
    for nth in range(1, 100):
        with failing(nth, number, monkeypatch) as count:
            try:
                records.write(path, {"age": "new"})
            except OSError as error:
                assert error.errno == number  # noqa: PT017
        assert [each.name for each in root.iterdir()] == ["record.json"]
        assert records.read(path)["age"] in ("old", "new")
        if count() < nth:
            break
        records.write(path, {"age": "old"})
    assert nth >= 3
    assert records.read(path) == {"age": "new"}


@pytest.mark.parametrize(
    "number", [NUMBERS[0], *(pytest.param(number, marks=pytest.mark.guests) for number in NUMBERS[1:])], ids=errno.errorcode.get
)
@pytest.mark.usefixtures("image")
def test_a_machine_is_provided_or_the_reason_told_whichever_call_fails_and_no_other_one_is_touched(  # noqa: PLR0917 - fixtures
    root: Path, catalog: Catalog, number: int, monkeypatch: pytest.MonkeyPatch, rounds: Rounds, left: Callable[[], object]
) -> None:
    spec, backend = MachineSpec(source="debian-12"), FakeBackend()
    others = Provisioner(catalog, backend, name="fake", settings=Settings())
    with others.machine(MachineSpec(source="debian-12", name="other")) as other:
        living = len(list((root / "run").glob("*/*.json")))
        for nth in steps(rounds, number):
            shutil.rmtree(root / "packs", ignore_errors=True)
            mine = Catalog(root)
            provisioner = Provisioner(mine, backend, name="fake", settings=Settings())
            with failing(nth, number, monkeypatch) as count, suppress(VMBottleError), provisioner.machine(spec) as machine:
                assert machine.exec(["true"]).ok
            provisioner.close()
            mine.close()
            assert other.exec(["true"]).ok
            assert len(list((root / "run").glob("*/*.json"))) == living, f"after call {nth} failed"
            found, damaged = packs.scan(catalog.packs)
            assert not damaged
            for pack in found:
                pack.verify()
            if count() < nth:
                break
    others.close()
    catalog.close()
    assert not left()


def steps(rounds: Rounds, number: int) -> list[int]:
    """Return all calls by number or, where there is little time, some of them, others for each kind of error."""
    if len(rounds("B13", 1)) > 1:
        return list(range(1, 400))
    return [*range(1 + number % 7, 60, 7), 400]


SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from pytest_vmbottle import CatalogError, MachineSpec, VMBottleError
root = Path(sys.argv[1])
root.mkdir(exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "none", str(root)], check=True)
from pytest_vmbottle.catalog.catalog import Catalog

def fill():
    try:
        with open(root / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError as error:
        assert error.strerror == "No space left on device", error

catalog = Catalog(root)
with catalog.rundir("vm") as folder:
    (folder / "overlay").write_bytes(bytes(8192))
    fill()
assert not folder.exists()
fill()
try:
    with catalog.rundir("other"):
        raise SystemExit("there was room")
except OSError as error:
    print(error.strerror)
print([path.name for path in folder.parent.iterdir()])
"""


def _own_mounts() -> list[str]:
    return ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


needs_mounts = pytest.mark.skipif(
    subprocess.run([*_own_mounts(), "true"], capture_output=True, check=False).returncode != 0,
    reason="a disk that is full takes a mount of one's own, which this host does not give",
)


@needs_mounts
def test_on_a_full_disk_machines_end_as_ever_and_a_new_one_is_refused_with_the_reason(root: Path) -> None:
    argv = [*_own_mounts(), sys.executable, "-c", SMALL_DISK, str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["No space left on device", "[]"]


# -- records of other versions -------------------------------------------------------------------------------------------------------------

OLD = Path(__file__).parent / "old_records"


def test_what_older_versions_have_written_is_read(root: Path, tmp_path: Path, catalog: Catalog) -> None:
    shutil.copytree(OLD / "images", root / "images")
    disk = bytearray(1 << 20)
    disk[510:512] = b"\x55\xaa"
    for folder in (root / "images" / "sha256").iterdir():
        (folder / "disk.raw").write_bytes(disk)
    images = ImageStore(catalog.images).list()

    assert {(image.name, image.format, image.firmware, image.prepared) for image in images} == {("version-0", "raw", "bios", False)}
    ImageStore(catalog.images).verify("version-0")
    before = records.read(root / "images" / "names" / "version-0.json")
    records.write(tmp_path / "again.json", before)
    assert records.read(tmp_path / "again.json") == before


def test_what_newer_versions_have_written_is_refused_and_stays_as_it_is(root: Path, catalog: Catalog) -> None:
    names = root / "images" / "names"
    names.mkdir(parents=True)
    records.write(names / "newer.json", {"sha256": "0" * 64}, version=99)
    before = (names / "newer.json").read_bytes()
    pack = root / "packs" / "key"
    pack.mkdir(parents=True)
    (pack / "pack.json").write_text(json.dumps({"format": 99}))

    with pytest.raises(CatalogError, match="version 99"):
        ImageStore(catalog.images).get("newer")
    assert list(packs.scan(catalog.packs)[1]) == ["key"]
    assert (names / "newer.json").read_bytes() == before
