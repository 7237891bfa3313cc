"""Machines without pytest, asked as the command and the service ask them: their disks and snapshots stay when they end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.errors import CatalogError, MachineError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.orders import new_order

pytestmark = pytest.mark.guests
FACTOR = "3"
LAYER = """
from pytest_vmbottle import layer

@layer("debian-12")
def noted(vm):
    vm.exec("echo layered >/srv/noted; mkdir /run/noted")
"""


def start(catalog: Catalog, source: str, name: str, folder: Path = Path("/"), **keywords: Any) -> Kept:
    order = new_order(
        catalog.machines,
        catalog=catalog.root,
        source=source,
        name=name,
        keywords=keywords,
        settings={"timeout-factor": FACTOR},
        folder=folder,
    )
    order.place.start(order.facts, print, snapshot=order.snapshot)
    return order.place


def remove(place: Kept) -> None:
    place.stop(now=True)
    assert place.discard()


def sh(place: Kept, script: str, tmp_path: Path) -> str:
    """Run a script in the guest, and return its output."""
    with (tmp_path / "out").open("w+b") as out, Path(os.devnull).open("rb") as nothing:
        request: dict[str, Any] = {"verb": "exec", "argv": ["sh", "-ec", script], "env": {}, "cwd": None, "user": None, "timeout": 120}
        assert place.ask(request, [nothing.fileno(), out.fileno(), out.fileno()]) == 0
        return (tmp_path / "out").read_text()


@pytest.fixture(scope="module")
def web(vm_catalog: Catalog) -> Iterator[Kept]:
    """A machine that the tests of this module use one after the other."""
    place = start(vm_catalog, "debian-12", f"kept{os.getpid()}")
    yield place
    remove(place)


@pytest.fixture(autouse=True)
def _runs(web: Kept) -> None:
    if not web.is_held:
        web.start_again(print)


def test_a_machine_that_was_stopped_starts_again_with_its_disk(web: Kept, tmp_path: Path) -> None:
    sh(web, "echo kept >/root/file", tmp_path)
    stopped = web.stop()

    assert (stopped.state, web.can_start_again) == ("stopped", True)
    with pytest.raises(MachineError, match="shut down"):
        web.ask({"verb": "pause"})
    with pytest.raises(CatalogError, match="vmbottle machine rm"):
        start_of_the_same_name(web)
    assert web.start_again(print).state == "running"
    assert sh(web, "cat /root/file", tmp_path) == "kept\n"
    with pytest.raises(CatalogError, match="runs"):
        web.start_again(print)


def start_of_the_same_name(place: Kept) -> None:
    place.start({"keywords": {}, "settings": {}}, print)


def test_a_machine_goes_back_to_its_snapshot_and_a_new_one_starts_from_it(web: Kept, vm_catalog: Catalog, tmp_path: Path) -> None:
    sh(web, "echo before >/root/file; sleep 500 >/dev/null 2>&1 & echo $! >/run/sleeper", tmp_path)
    web.ask({"verb": "snapshot", "label": "clean"})
    with pytest.raises(CatalogError, match="clean"):
        web.ask({"verb": "snapshot", "label": "clean"})
    sh(web, "echo after >/root/file; kill $(cat /run/sleeper)", tmp_path)
    web.ask({"verb": "restore", "label": "clean"})

    assert sh(web, "cat /root/file; kill -0 $(cat /run/sleeper)", tmp_path) == "before\n"
    with pytest.raises(SpecError, match="memory"):
        start(vm_catalog, f"{web.name}@clean", f"{web.name}-b", memory="2G")
    clone = start(vm_catalog, f"{web.name}@clean", f"{web.name}-b")
    try:
        web.stop(now=True)
        web.forget("clean")
        # Its files have names of its own.
        assert sh(clone, "cat /root/file; kill -0 $(cat /run/sleeper)", tmp_path) == "before\n"
    finally:
        remove(clone)
    # Its disk is what the snapshot had, and what was written since.
    web.start_again(print)
    assert sh(web, "cat /root/file", tmp_path) == "before\n"
    assert web.snapshots() == ()


def test_a_disk_outlives_a_daemon_that_is_killed_and_the_pack_that_it_stands_on(web: Kept, vm_catalog: Catalog, tmp_path: Path) -> None:
    sh(web, "echo written >/root/file; sync", tmp_path)
    record = web.record()
    assert record.keeper is not None
    assert record.pid is not None
    hypervisor = psutil.Process(record.pid)
    record.keeper.kill()
    hypervisor.wait(60)
    assert Deadline(60).poll(lambda: not web.is_held)

    assert (web.record().state, web.can_start_again) == ("stopped", True)
    # Nothing of the catalog's packs is named by it.
    assert str(vm_catalog.packs) not in (web.folder / "disk" / "start.json").read_text()
    web.start_again(print)
    assert sh(web, "cat /root/file", tmp_path) == "written\n"


def test_a_machine_that_cannot_start_again_is_as_it_was(web: Kept, tmp_path: Path) -> None:
    sh(web, "echo there >/root/file; sync", tmp_path)
    web.stop(now=True)
    aside = shutil.move(web.folder / "disk" / "seed.iso", tmp_path / "seed.iso")
    with pytest.raises(MachineError):
        web.start_again(print)
    assert web.record().state == "stopped"
    assert "could not be started" in web.record().reason
    shutil.move(aside, web.folder / "disk" / "seed.iso")
    web.start_again(print)

    assert sh(web, "cat /root/file", tmp_path) == "there\n"


def test_files_go_in_whole_or_not_at_all_and_come_back(web: Kept, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    (upload / "conf").mkdir(parents=True)
    (upload / "conf" / "site.conf").write_text("new\n")
    (upload / "run.sh").write_text("true\n")
    (upload / "run.sh").chmod(0o755)
    sh(web, "rm -rf /srv/app; mkdir -p /srv/app; echo old >/srv/app/old", tmp_path)
    web.ask({"verb": "upload", "src": str(upload), "dest": "/srv/app", "clean": False})
    assert sh(web, "cd /srv/app; ls -1; cat conf/site.conf; test -x run.sh", tmp_path) == "conf\nold\nrun.sh\nnew\n"
    web.ask({"verb": "upload", "src": str(upload), "dest": "/srv/app", "clean": True})
    assert sh(web, "ls -1 /srv/app", tmp_path) == "conf\nrun.sh\n"
    with pytest.raises(OSError, match="hostname"):
        web.ask({"verb": "upload", "src": str(upload), "dest": "/etc/hostname/app", "clean": True})
    assert sh(web, "ls -d /etc/.vmbottle-* /srv/.vmbottle-* 2>/dev/null || true", tmp_path) == ""


def test_what_is_read_written_and_listed_is_told_with_the_errors_of_the_guest(web: Kept, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(3 << 20))
    with source.open("rb") as file:
        assert web.ask({"verb": "write", "path": "/srv/big", "mode": 0o640, "owner": None}, [file.fileno()]) == 3 << 20
    with target.open("wb") as file:
        web.ask({"verb": "read", "path": "/srv/big"}, [file.fileno()])
    assert target.read_bytes() == source.read_bytes()
    assert sh(web, "stat -c %a /srv/big", tmp_path) == "640\n"
    (listed,) = [each for each in web.ask({"verb": "list", "paths": ["/srv"], "depth": 1}) if each["path"] == "/srv/big"]
    assert (listed["name"], listed["type"], listed["size"], listed["mode"]) == ("big", "file", 3 << 20, 0o640)
    with target.open("wb") as file:
        with pytest.raises(FileNotFoundError):
            web.ask({"verb": "read", "path": "/srv/none"}, [file.fileno()])
        with pytest.raises(IsADirectoryError):
            web.ask({"verb": "read", "path": "/srv"}, [file.fileno()])
        web.ask({"verb": "archive", "root": "/etc/ssh", "format": "zip"}, [file.fileno()])
    assert b"PK" in target.read_bytes()
    found = web.ask({"verb": "search", "pattern": "^root:", "regex": True, "root": "/etc/passwd"})
    assert [match["line"] for match in found["matches"]] == [1]
    web.ask({"verb": "mkdir", "paths": ["/srv/a/b", "/srv/c"]})
    assert sh(web, "ls -d /srv/a/b /srv/c", tmp_path) == "/srv/a/b\n/srv/c\n"
    assert not list(web.folder.glob(".copy-*"))


def test_a_link_in_the_guest_leads_to_a_file_of_the_guest(web: Kept, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    sh(web, f"ln -sf {tmp_path}/secret /srv/link; ln -sf /etc/hostname /srv/other", tmp_path)
    with (tmp_path / "target").open("w+b") as file:
        with pytest.raises(FileNotFoundError):
            web.ask({"verb": "read", "path": "/srv/link"}, [file.fileno()])
        web.ask({"verb": "read", "path": "/srv/other"}, [file.fileno()])
    assert (tmp_path / "target").read_text() == sh(web, "cat /etc/hostname", tmp_path)


def test_a_silent_command_ends_when_nobody_reads_it_any_more(web: Kept) -> None:
    read, write = os.pipe()
    os.close(read)
    with Path(os.devnull).open("rb") as nothing:
        request: dict[str, Any] = {"verb": "exec", "argv": ["sleep", "4711"], "env": {}, "cwd": None, "user": None, "timeout": 400}
        assert web.ask(request, [nothing.fileno(), write, write]) != 0
    os.close(write)


def test_a_terminal_has_the_size_of_its_window_and_the_status_of_its_program(web: Kept) -> None:
    session = web.terminal(argv=["sh", "-c", "read x; stty size; exit 5"], size=(99, 20))
    session.resize(120, 40)
    session.send(b"\r")
    said = b"".join(iter(session.receive, b""))
    assert (b"40 120" in said, session.status) == (True, 5)
    session.close()


def test_a_pack_is_started_by_its_key_and_a_layer_by_its_file(web: Kept, vm_catalog: Catalog, tmp_path: Path) -> None:
    del web
    (tmp_path / "conftest.py").write_text(LAYER)
    place = start(vm_catalog, "conftest.py::noted", f"layer{os.getpid()}", tmp_path)
    try:
        assert sh(place, "cat /srv/noted; ls -d /run/noted", tmp_path) == "layered\n/run/noted\n"
    finally:
        remove(place)
    key = next(pack.key for pack in packs.scan(vm_catalog.packs)[0] if pack.manifest.name == "noted")
    place = start(vm_catalog, f"pack:{key[:12]}", f"pack{os.getpid()}")
    try:
        assert sh(place, "cat /srv/noted; ls -d /run/noted", tmp_path) == "layered\n/run/noted\n"
    finally:
        remove(place)


def test_a_paused_machine_is_told_as_paused_and_a_port_as_forwarded(web: Kept) -> None:
    web.ask({"verb": "pause"})
    assert web.record().state == "paused"
    web.ask({"verb": "resume"})
    host, port = web.ask({"verb": "forward", "port": 8080})

    assert (web.record().state, host, web.record().ports) == ("running", "127.0.0.1", {"8080": port})
    assert "systemd" in web.ask({"verb": "journal", "unit": "init.scope", "lines": 5})
