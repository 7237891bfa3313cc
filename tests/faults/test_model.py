"""The catalog under any sequence of what may happen to it, compared with a model that is a few dictionaries."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pytest_vmbottle import CatalogError, SpecError
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.host import supervisor
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.supervisor import Record

GIB = 1 << 30
LIMIT = 3 * GIB
KEYS = st.sampled_from(["aaaa", "bbbb"])
PICK = st.integers(0, 99)
JUNK = st.sampled_from([b"", b"{", b"\xff", b"[]", b'{"sha256": "", "record": {}}'])
_numbers = itertools.count()


class NoSupervisor:
    """Stands beside owners whose death is not to be noticed before somebody cleans up."""

    is_running = True

    def __init__(self, folder: Path, lock: int) -> None:
        """Starts nothing."""

    def close(self) -> None:
        """Ends nothing."""


@attrs.define(eq=False)
class Owner:
    """A process that uses the catalog; all of them live in this one, and can die alone."""

    catalog: Catalog
    budget: Budget
    machines: dict[Path, AbstractContextManager[Path]] = attrs.field(factory=dict)
    leases: list[tuple[Path, int]] = attrs.field(factory=list)
    shares: list[AbstractContextManager[None]] = attrs.field(factory=list)

    @property
    def folder(self) -> Path | None:
        """The folder of the owner's machines."""
        return None if self.catalog._owner is None else self.catalog._owner.folder

    def die(self) -> None:
        """Does what the kernel does for a process that was killed: closes its files, and no more."""
        for _, fd in self.leases:
            os.close(fd)
        for share in self.shares:
            frame = share.gen.gi_frame  # type: ignore[attr-defined]
            os.close(frame.f_locals["fd"])
        if self.catalog._owner is not None:
            os.close(self.catalog._owner._fd)


class Model(RuleBasedStateMachine):
    """State machine of everything that may happen."""

    graveyard: list[Owner]

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """An empty catalog."""
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="vmbottle-model-"))
        self.viewer = Catalog(self.root)
        self.owners: list[Owner] = []
        self.graveyard = []  # what the dead held is not to be tidied up by the end of their variables
        self.packs: dict[str, dict[Path, bytes]] = {}
        self.corrupt: set[Path] = set()
        self.aside = 0
        self.patch, self.clock = patch, 0.0
        self.real_time = time.time
        patch.setattr(time, "time", lambda: self.real_time() + self.clock)

    def owner(self, pick: int) -> Owner:
        return self.owners[pick % len(self.owners)]

    def leased(self, pack: Path) -> bool:
        return any(held == pack for owner in self.owners for held, _ in owner.leases)

    def forget_what_was_replaced(self) -> None:
        for key, generations in self.packs.items():
            last = list(generations)[-1]
            self.packs[key] = {pack: content for pack, content in generations.items() if pack == last or self.leased(pack)}

    # -- processes

    @precondition(lambda self: len(self.owners) < 4)
    @rule()
    def come(self) -> None:
        self.owners.append(Owner(Catalog(self.root), Budget(self.root / "budget", limit=LIMIT)))

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def crash(self, pick: int) -> None:
        owner = self.owner(pick)
        owner.die()
        self.owners.remove(owner)
        self.graveyard.append(owner)

    @precondition(lambda self: any(not owner.machines for owner in self.owners))
    @rule()
    def leave(self) -> None:
        owner = next(owner for owner in self.owners if not owner.machines)
        for _, fd in owner.leases:
            os.close(fd)
        for share in owner.shares:
            share.__exit__(None, None, None)
        owner.catalog.close()
        self.owners.remove(owner)

    # -- machines

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def start(self, pick: int) -> None:
        owner = self.owner(pick)
        machine = owner.catalog.rundir(f"vm-{next(_numbers)}")
        folder = machine.__enter__()
        (folder / "overlay").write_text("x")
        owner.machines[folder] = machine

    @precondition(lambda self: any(owner.machines for owner in self.owners))
    @rule()
    def stop(self) -> None:
        owner = next(owner for owner in self.owners if owner.machines)
        folder, machine = owner.machines.popitem()
        machine.__exit__(None, None, None)
        self.corrupt.discard(folder)
        assert not folder.exists()
        assert not folder.with_name(f"{folder.name}.json").exists()

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def start_on_a_full_disk(self, pick: int) -> None:
        owner, before = self.owner(pick), self.run()
        with full_disk(self.patch), pytest.raises(OSError, match="No space left"):
            owner.catalog.rundir(f"vm-{next(_numbers)}").__enter__()
        assert [path for path in self.run() - before if path.is_dir() and path.parent != self.root / "run"] == []

    @precondition(lambda self: any(owner.machines for owner in [*self.owners, *self.graveyard]))
    @rule(pick=PICK, junk=JUNK)
    def corrupt_record(self, pick: int, junk: bytes) -> None:
        folders = [folder for owner in [*self.owners, *self.graveyard] for folder in owner.machines]
        folder = folders[pick % len(folders)]
        folder.with_name(f"{folder.name}.json").write_bytes(junk)
        self.corrupt.add(folder)

    # -- packs

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, key=KEYS, content=st.binary(min_size=1, max_size=9))
    def publish(self, pick: int, key: str, content: bytes) -> None:
        with self.owner(pick).catalog.staging() as folder:
            (folder / "disk").write_bytes(content)
            final = self.owner(pick).catalog.publish(folder, key)
        assert final not in self.packs.get(key, {}), "what is there is never changed"
        self.packs.setdefault(key, {})[final] = content
        self.forget_what_was_replaced()

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, key=KEYS)
    def publish_on_a_full_disk(self, pick: int, key: str) -> None:
        with pytest.raises(OSError, match="No space left"), self.owner(pick).catalog.staging() as folder:  # noqa: PT012
            (folder / "disk").write_bytes(b"never")
            with full_disk(self.patch):
                self.owner(pick).catalog.publish(folder, key)
        assert not folder.exists()

    @precondition(lambda self: self.owners and self.packs)
    @rule(pick=PICK)
    def restore_what_is_there(self, pick: int) -> None:
        self.restore(pick, sorted(self.packs)[pick % len(self.packs)])

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, key=KEYS)
    def restore(self, pick: int, key: str) -> None:
        owner = self.owner(pick)
        if key in self.packs:
            pack = owner.catalog.pack(key)
            owner.leases.append((pack, owner.catalog.lease(pack)))
        else:
            with pytest.raises(FileNotFoundError):
                owner.catalog.lease(owner.catalog.pack(key))

    @precondition(lambda self: any(owner.leases for owner in self.owners))
    @rule(pick=PICK)
    def give_back(self, pick: int) -> None:
        leases = [(owner, lease) for owner in self.owners for lease in owner.leases]
        owner, lease = leases[pick % len(leases)]
        owner.leases.remove(lease)
        os.close(lease[1])

    @precondition(lambda self: self.owners)
    @rule(pick=PICK, key=KEYS)
    def delete(self, pick: int, key: str) -> None:
        catalog = self.owner(pick).catalog
        generations = self.packs.pop(key, {})
        first = next((number for number, pack in enumerate(generations) if self.leased(pack)), len(generations))
        left = dict(list(generations.items())[first:])
        assert catalog.discard(catalog.pack(key)) is not bool(left)
        if left:
            self.packs[key] = left

    # -- memory

    @precondition(lambda self: self.owners)
    @rule(pick=PICK)
    def take_memory(self, pick: int) -> None:
        owner = self.owner(pick)
        share = owner.budget.reserve(GIB, name="vm", deadline=Deadline(0), waiting=lambda _: None)
        taken = sum(len(each.shares) for each in self.owners)
        if taken < 3:
            share.__enter__()
            owner.shares.append(share)
        else:
            with pytest.raises(SpecError if len(owner.shares) == 3 else CatalogError):
                share.__enter__()

    @precondition(lambda self: any(owner.shares for owner in self.owners))
    @rule()
    def give_memory_back(self) -> None:
        next(owner for owner in self.owners if owner.shares).shares.pop().__exit__(None, None, None)

    # -- time, and tidying up

    @rule(days=st.floats(-400, 400))
    def set_clock(self, days: float) -> None:
        self.clock = days * 86400

    @rule(dry_run=st.booleans())
    def gc(self, dry_run: bool) -> None:  # noqa: FBT001
        dead = {owner.folder: owner for owner in self.graveyard if owner.folder is not None}
        found = self.viewer.gc(dry_run=dry_run)
        assert {self.root / "run" / each.owner for each in found} == dead.keys()
        for each in found:
            assert not each.processes
            assert not each.kept
            assert set(each.machines) == {folder.name for folder in dead[self.root / "run" / each.owner].machines}
        if not dry_run:
            self.forget_what_was_replaced()
            self.aside += sum(folder in self.corrupt for owner in dead.values() for folder in owner.machines)
            for owner in self.graveyard:
                owner.machines.clear()
                owner.catalog._owner = None

    # -- what always holds

    def run(self) -> set[Path]:
        run = self.root / "run"
        return {*run.glob("*"), *run.glob("*/*")}

    @invariant()
    def every_machine_has_a_record_and_no_folder_is_nobodys(self) -> None:
        for folder in (folder for owner in [*self.owners, *self.graveyard] for folder in owner.machines):
            assert (folder / "overlay").read_text() == "x"
            record = folder.with_name(f"{folder.name}.json")
            if folder in self.corrupt:
                with pytest.raises(ValueError):  # noqa: PT011
                    Record.read(record)
            else:
                assert Record.read(record).owner.pid == os.getpid()
        known = [owner.folder for owner in [*self.owners, *self.graveyard] if owner.folder is not None]
        assert {path for path in (self.root / "run").glob("*") if path.is_dir()} == set(known)
        assert len(list((self.root / "quarantine").glob("*"))) == self.aside

    @invariant()
    def packs_are_what_was_published_and_in_use_while_they_are_held(self) -> None:
        catalog = self.viewer
        there = {pack: content for generations in self.packs.values() for pack, content in generations.items()}
        assert {path: (path / "disk").read_bytes() for path in catalog.packs.glob("*")} == there
        for key, generations in self.packs.items():
            assert catalog.pack(key) == list(generations)[-1]
            assert catalog.in_use(catalog.pack(key)) is any(map(self.leased, generations))

    @invariant()
    def memory_is_held_by_the_living_alone(self) -> None:
        budget = Budget(self.root / "budget", limit=LIMIT)
        turns = budget._turns() if (self.root / "budget").exists() else []
        assert sum(turn.size for turn in turns) == GIB * sum(len(owner.shares) for owner in self.owners) <= LIMIT

    def teardown(self) -> None:
        while self.owners:
            owner = self.owners.pop()
            owner.die()
            self.graveyard.append(owner)
        self.clock = 0.0
        _KEPT.extend(self.graveyard)
        self.viewer.gc()
        assert list((self.root / "run").glob("*")) == []
        shutil.rmtree(self.root)


_KEPT: list[Owner] = []


@contextmanager
def full_disk(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing more can be written."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.context() as inner:
        inner.setattr(os, "fsync", fsync)
        yield


def test_whatever_happens_the_catalog_is_what_the_model_says(monkeypatch: pytest.MonkeyPatch, rounds: Callable[[str, int], range]) -> None:
    monkeypatch.setattr("pytest_vmbottle.catalog.catalog.Supervisor", NoSupervisor)
    monkeypatch.setattr(supervisor, "_LATE", 0.0)  # nothing was being started by these dead
    try:
        run_state_machine_as_test(
            partial(Model, monkeypatch),  # type: ignore[arg-type]  # whatever makes one will do
            settings=settings(
                max_examples=len(rounds("F1", 30)),
                stateful_step_count=50,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        for owner in _KEPT:  # their descriptors are others' by now
            forget(owner)
        _KEPT.clear()


def forget(owner: Owner) -> None:
    """Ends what a dead owner was in the middle of, without closing anything."""
    generators: list[Any] = [each.gen for each in (*owner.machines.values(), *owner.shares)]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, suppress(BaseException):
        patch.setattr(os, "close", lambda _: None)
        for generator in generators:
            generator.close()
