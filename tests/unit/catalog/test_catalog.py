"""The shared directory, with real processes that fight for it, are killed, and leave things behind."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_vmbottle import CatalogError
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_reason, default_root
from pytest_vmbottle.host import locks
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.generations import SNAPSHOTS
from pytest_vmbottle.host.supervisor import Identity, Record
from tests.conftest import line, process

PRELUDE = """
import sys, time, os
from contextlib import ExitStack
from pathlib import Path
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.catalog.catalog import Catalog
catalog = Catalog(Path(sys.argv[1]))
"""
HOLD = (
    PRELUDE
    + """
with catalog.lock("thing", deadline=Deadline(30), waiting=lambda _: None):
    print("held", flush=True)
    sys.stdin.read()
"""
)
LIVE = (
    PRELUDE
    + """
with catalog.rundir("vm-1") as folder:
    (folder / "overlay").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""
)
COUNT = (
    PRELUDE
    + """
counter = catalog.root / "counter"
for _ in range(40):
    with catalog.lock("counter", deadline=Deadline(60), waiting=lambda _: None):
        value = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(value + 1))
"""
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(tmp_path / "catalog")
    yield catalog
    catalog.close()


def quiet(_: str) -> None:
    pass


# -- the folder ------------------------------------------------------------------------------------------------------------------------


def test_opening_a_catalog_makes_one_private_folder_and_nothing_in_it(catalog: Catalog) -> None:
    assert stat.S_IMODE(catalog.root.stat().st_mode) == 0o700
    assert list(catalog.root.iterdir()) == []


def test_a_catalog_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    Catalog(tmp_path / "open")

    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755, 0o1777])
def test_a_folder_with_something_in_it_that_others_may_enter_is_refused_and_left_as_it_is(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "it's open"
    root.mkdir()
    (root / "file").write_text("whose?")
    root.chmod(mode)

    with pytest.raises(CatalogError, match=f"{mode:04o}"):
        Catalog(root)
    assert stat.S_IMODE(root.stat().st_mode) == mode
    assert [path.name for path in root.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CatalogError, match="Function not implemented"):
        Catalog(tmp_path / "catalog")


def test_a_symbolic_link_is_refused_as_catalog(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    with pytest.raises(CatalogError, match="symbolic link"):
        Catalog(tmp_path / "link")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_dangling_symbolic_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")

    with pytest.raises(CatalogError, match="symbolic link"):
        Catalog(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_a_file_is_refused_as_catalog_and_as_a_folder_above_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CatalogError, match=re.escape(str(root))):
            Catalog(root)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    root = tmp_path / "theirs"
    root.mkdir(mode=0o755)
    os.chown(root, 12345, 12345)

    with pytest.raises(CatalogError, match="12345"):
        Catalog(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_a_place_where_nothing_can_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="/proc/vmbottle"):
        Catalog(Path("/proc/vmbottle"))
    with pytest.raises(CatalogError, match="File name too long"):
        Catalog(tmp_path / ("x" * 300))


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
def test_a_network_file_system_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Only the table of mounts is made up: a test cannot count on a server of each kind.
    mounts = [psutil._ntuples.sdiskpart("/dev/root", "/", "ext4", "rw"), psutil._ntuples.sdiskpart("server:/", str(tmp_path), kind, "rw")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda *_args, **_keywords: mounts)

    with pytest.raises(CatalogError, match=re.escape(kind)):
        Catalog(tmp_path / "catalog")
    Catalog(tmp_path.parent / f"{tmp_path.name}-local")


def test_the_default_catalog_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert default_root() == tmp_path / "pytest-vmbottle"
    assert default_reason() == ""


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder in which not even root can make anything, because it is a file."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_the_cache_folder_cannot_be_written_the_default_is_a_private_folder_in_a_public_one(no_cache: Path) -> None:
    assert default_root() == Path(f"/var/tmp/pytest-vmbottle-{os.geteuid()}")
    assert str(no_cache) in default_reason()


def test_a_user_without_a_home_has_no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a number that no user has, where HOME is not set
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    assert default_root() == Path(f"/var/tmp/pytest-vmbottle-{os.geteuid()}")
    assert "home" in default_reason()


def test_where_nothing_can_be_written_the_default_is_what_it_always_was(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.catalog.location._LASTING", (no_cache,))

    assert default_root() == no_cache / "pytest-vmbottle"
    with pytest.raises(CatalogError, match="--vm-catalog"):
        Catalog(default_root())


# -- locks -----------------------------------------------------------------------------------------------------------------------------


def test_two_processes_never_hold_a_lock_together(catalog: Catalog) -> None:
    (catalog.root / "counter").write_text("0")
    with process(COUNT, catalog.root) as one, process(COUNT, catalog.root) as other:
        assert (one.wait(60), other.wait(60)) == (0, 0)

    assert (catalog.root / "counter").read_text() == "80"


def test_the_lock_of_a_killed_process_goes_to_the_next(catalog: Catalog) -> None:
    with process(HOLD, catalog.root) as holder:
        assert line(holder) == "held"
        with pytest.raises(CatalogError), catalog.lock("thing", deadline=Deadline(0), waiting=quiet):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        taken: list[str] = []
        with catalog.lock("thing", deadline=Deadline(10), waiting=taken.append):
            taken.append("taken")

    assert taken == ["taken"]


def test_who_waits_in_vain_is_told_which_process_holds_the_lock(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.catalog.catalog._LONG_WAIT", 0.05)
    told: list[str] = []
    with process(HOLD, catalog.root) as holder:
        assert line(holder) == "held"
        with (
            pytest.raises(CatalogError, match=str(holder.pid)),
            catalog.lock("thing", deadline=Deadline(1), waiting=told.append),
        ):
            pass

    assert len(told) == 1
    assert str(holder.pid) in told[0]


def test_who_waits_is_told_again_and_again_how_far_the_holder_is(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_vmbottle.catalog.catalog._LONG_WAIT", 0.05)
    monkeypatch.setattr("pytest_vmbottle.catalog.catalog._MOMENT", 0.05)
    told: list[str] = []
    text = HOLD.replace("waiting=lambda _: None):", "waiting=lambda _: None) as tell:").replace(
        "    print", '    tell("  3 s  unpacking")\n    print'
    )
    with process(text, catalog.root) as holder:
        assert line(holder) == "held"
        with pytest.raises(CatalogError, match="unpacking"), catalog.lock("thing", deadline=Deadline(0.8), waiting=told.append):
            pass

    assert len(told) > 1
    assert all(str(holder.pid) in each and "unpacking" in each for each in told)


def test_files_that_killed_writers_left_are_removed_later_and_nothing_else(catalog: Catalog) -> None:
    with catalog.lock("thing", deadline=Deadline(1), waiting=quiet):
        pass
    locks = catalog.root / "locks"
    (locks / ".thing.holder.0123456789ab").touch()
    (locks / ".thing.holder.ba9876543210").touch()
    (locks / ".note").touch()
    for name in (".thing.holder.0123456789ab", ".note", "thing.lock"):
        os.utime(locks / name, (1, 1))
    catalog.gc(dry_run=True)
    before = {path.name for path in locks.iterdir()}
    catalog.gc()

    assert before - {path.name for path in locks.iterdir()} == {".thing.holder.0123456789ab"}


def test_a_lock_is_free_again_when_its_block_fails_and_other_locks_are_not_in_the_way(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog.lock("thing", deadline=Deadline(1), waiting=quiet):
        raise RuntimeError
    with catalog.lock("thing", deadline=Deadline(0), waiting=quiet), catalog.lock("other", deadline=Deadline(0), waiting=quiet):
        assert sorted(path.name for path in (catalog.root / "locks").glob("*.lock")) == ["other.lock", "thing.lock"]


@pytest.mark.parametrize("record", [b"", b"{}", b"null", b"\xff", b'{"pid": "x", "since": 1}', b'{"pid": 1, "since": null}'])
def test_a_damaged_record_of_the_holder_does_not_hide_that_the_lock_is_held(catalog: Catalog, record: bytes) -> None:
    with process(HOLD, catalog.root) as holder:
        assert line(holder) == "held"
        (catalog.root / "locks" / "thing.holder").write_bytes(record)
        with pytest.raises(CatalogError, match="thing"), catalog.lock("thing", deadline=Deadline(0), waiting=quiet):
            pass


# -- the folders of machines ---------------------------------------------------------------------------------------------------------------


def test_a_machines_folder_is_private_and_gone_at_the_end_even_after_a_failure(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog.rundir("vm-1") as folder:  # noqa: PT012
        (folder / "file").touch()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        raise RuntimeError

    assert not folder.exists()


def supervisor_of(owner: Path) -> psutil.Process:
    words = {each: " ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])}
    return next(each for each, line in words.items() if "supervisor.py" in line and str(owner) in line)


def test_what_a_killed_process_left_is_removed_by_its_supervisor_and_nothing_of_a_living_one(catalog: Catalog) -> None:
    with process(LIVE, catalog.root) as living, process(LIVE, catalog.root) as dead, catalog.rundir("ours") as ours:
        theirs, left = Path(line(living)), Path(line(dead))
        dead.send_signal(signal.SIGKILL)
        dead.wait()

        assert Deadline(10).poll(lambda: not left.parent.with_suffix(".lock").exists())
        assert not left.parent.exists()
        assert (theirs / "overlay").read_text() == "x"
        assert ours.is_dir()


def test_gc_removes_what_is_left_when_process_and_supervisor_were_killed_and_nothing_of_a_living_one(catalog: Catalog) -> None:
    with process(LIVE, catalog.root) as living, process(LIVE, catalog.root) as dead, catalog.rundir("ours") as ours:
        theirs, left = Path(line(living)), Path(line(dead))
        assert catalog.gc() == ()
        supervisor_of(left.parent).kill()
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert Deadline(10).poll(lambda: catalog.gc(dry_run=True))
        assert left.is_dir()

        reaped = catalog.gc()
        assert [(each.owner, each.machines, each.kept) for each in reaped] == [(left.parent.name, ("vm-1",), ())]
        assert not left.parent.exists()
        assert not left.parent.with_suffix(".lock").exists()
        assert (theirs / "overlay").read_text() == "x"
        assert ours.is_dir()
        assert catalog.gc() == ()


def test_a_supervisor_that_was_killed_is_replaced_with_the_next_machine(catalog: Catalog) -> None:
    with catalog.rundir("first") as folder:
        first = supervisor_of(folder.parent)
        first.kill()
        assert Deadline(10).poll(lambda: first.status() == psutil.STATUS_ZOMBIE)
        with catalog.rundir("second") as second:
            assert second.parent == folder.parent
            assert supervisor_of(folder.parent).pid != first.pid


def test_a_machine_is_written_down_before_its_folder_is_there_and_forgotten_after_it_is_gone(catalog: Catalog) -> None:
    asked = []

    def ending(folder: Path) -> tuple[str, ...]:
        asked.append(folder.exists())
        return ("end", str(folder))

    with catalog.rundir("vm-1", ending=ending) as folder:
        record = Record.read(folder.with_name("vm-1.json"))
        assert (record.owner, record.process, record.ending) == (Identity.of(os.getpid()), None, ("end", str(folder)))
        catalog.note_process(folder, os.getpid())
        assert Record.read(folder.with_name("vm-1.json")).process == Identity.of(os.getpid())

    assert asked == [False]
    assert list((catalog.root / "run").glob("*/*")) == []


def test_a_forked_child_has_a_folder_of_its_own(catalog: Catalog) -> None:
    with catalog.rundir("parent") as folder:
        child = os.fork()
        if child == 0:
            with catalog.rundir("child") as own:
                os._exit(0 if own.parent != folder.parent else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- packs -----------------------------------------------------------------------------------------------------------------------------


def publish(catalog: Catalog, content: str, key: str = "key") -> Path:
    with catalog.staging() as folder:
        (folder / "disk").write_text(content)
        return catalog.publish(folder, key)


def test_a_published_pack_is_there_whole_and_its_building_place_is_gone(catalog: Catalog) -> None:
    assert publish(catalog, "first") == catalog.packs / "key"

    assert [(path.name, path.read_text()) for path in (catalog.packs / "key").iterdir()] == [("disk", "first")]
    assert list(catalog.root.rglob("staging-*")) == []


def test_a_pack_that_is_made_again_takes_the_place_of_one_that_nobody_holds(catalog: Catalog) -> None:
    publish(catalog, "first")
    again = publish(catalog, "second")

    assert catalog.pack("key") == again
    assert (again / "disk").read_text() == "second"
    assert list(catalog.packs.iterdir()) == [again]
    assert list(catalog.root.rglob("staging-*")) == []


def test_a_pack_that_is_made_again_stands_beside_the_one_that_is_held_until_its_last_holder_has_gone(catalog: Catalog) -> None:
    first = publish(catalog, "first")
    holds = [catalog.lease(first), catalog.lease(first)]
    second, third = publish(catalog, "second"), publish(catalog, "third")

    assert catalog.pack("key") == third
    assert (first / "disk").read_text() == "first"
    assert not second.exists(), "nobody held it"
    for hold in holds:
        catalog.gc()
        assert first.exists()
        os.close(hold)
    catalog.gc()
    assert list(catalog.packs.iterdir()) == [third]


def test_a_pack_that_could_not_be_built_leaves_nothing(catalog: Catalog) -> None:
    with pytest.raises(RuntimeError), catalog.staging() as folder:  # noqa: PT012
        (folder / "disk").write_text("half")
        raise RuntimeError

    assert not folder.exists()
    assert not catalog.packs.exists()


def test_a_pack_that_is_held_is_not_discarded(catalog: Catalog) -> None:
    pack = publish(catalog, "x")
    hold, other = catalog.lease(pack), catalog.lease(pack)
    assert not catalog.discard(pack)
    os.close(hold)
    assert not catalog.discard(pack)
    assert (pack / "disk").read_text() == "x"
    os.close(other)

    assert catalog.discard(pack)
    assert list(catalog.packs.iterdir()) == []


def test_a_pack_is_in_use_while_one_that_it_replaced_is_so_that_no_old_one_comes_back(catalog: Catalog) -> None:
    hold = catalog.lease(publish(catalog, "old"))
    pack = publish(catalog, "new")

    assert catalog.in_use(pack)
    assert not catalog.discard(pack)
    assert (catalog.pack("key") / "disk").read_text() == "new"
    os.close(hold)
    assert catalog.discard(pack)
    assert list(catalog.packs.iterdir()) == []


def test_what_is_damaged_and_held_stays_where_it_is(catalog: Catalog) -> None:
    pack = publish(catalog, "x")
    hold = catalog.lease(pack)

    assert catalog.quarantine(pack) is None
    assert (pack / "disk").read_text() == "x"
    os.close(hold)
    aside = catalog.quarantine(pack)
    assert aside is not None
    assert (aside / "disk").read_text() == "x"
    assert not pack.exists()


def test_the_folder_of_a_machine_that_has_ended_stays_while_another_one_runs_from_its_snapshot(catalog: Catalog) -> None:
    with catalog.rundir("vm-1") as first:
        snapshot = first / SNAPSHOTS / "one"
        snapshot.mkdir(parents=True)
        hold = catalog.lease(snapshot)
    with catalog.rundir("vm-2"):
        assert snapshot.exists()
    os.close(hold)
    with catalog.rundir("vm-3"):
        pass

    assert not first.exists()
    assert not first.with_name("vm-1.json").exists()


def test_the_hold_of_a_killed_process_ends_with_it(catalog: Catalog) -> None:
    pack = publish(catalog, "x")
    with process(
        PRELUDE + "\nfd = catalog.lease(catalog.packs / 'key')\nprint('held', flush=True)\nsys.stdin.read()\n", catalog.root
    ) as holder:
        assert line(holder) == "held"
        assert not catalog.discard(pack)
        holder.send_signal(signal.SIGKILL)
        holder.wait()

        assert catalog.discard(pack)


def test_a_pack_that_is_not_there_cannot_be_held_and_is_gone_already(catalog: Catalog) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        catalog.lease(catalog.packs / "nothing")
    assert catalog.discard(catalog.packs / "nothing")


def test_what_is_damaged_is_moved_aside_and_kept_each_time_under_another_name(catalog: Catalog) -> None:
    aside = [path for text in ("one", "two") if (path := catalog.quarantine(publish(catalog, text)))]

    assert [(path / "disk").read_text() for path in aside] == ["one", "two"]
    assert not (catalog.packs / "key").exists()
    assert {path.parent for path in aside} == {catalog.root / "quarantine"}


def test_a_closed_catalog_has_no_trace_of_this_process_and_can_be_used_again(catalog: Catalog) -> None:
    for _ in range(2):
        with catalog.rundir("vm-1"):
            pass
        assert len(list((catalog.root / "run").iterdir())) == 2
        catalog.close()
        catalog.close()
        assert list((catalog.root / "run").iterdir()) == []


def test_a_process_that_ends_while_open_files_are_looked_through_has_none(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w"):
        assert str(tmp_path / "open") in locks._open_files(Path("/proc/self"))
    with process("pass") as ended:
        ended.wait()
    assert list(locks._open_files(Path("/proc", str(ended.pid)))) == []
