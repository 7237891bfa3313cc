"""The machines of a catalog, as the service shows and changes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.host.locks import tried
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.service.shared import Shared
from pytest_vmbottle.service.starts import Starts
from pytest_vmbottle.service.threads import Threads
from pytest_vmbottle.standalone.client import DISK, Kept, all_kept
from pytest_vmbottle.standalone.orders import new_order
from pytest_vmbottle.standalone.record import STARTING, Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_vmbottle.service.options import Options
    from pytest_vmbottle.service.schema import Action, NewMachine

__all__ = ["Machines"]

_QUICK, _LONG, _POWER = 8, 64, 16
"""Threads for what only looks at files, for requests to daemons, and for actions."""
_WAITING = 256
_MIB, _GIB = 1 << 20, 1 << 30
_RENAMED: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "vcpus": ("cpus", int),
    "mem_mib": ("memory", lambda mib: mib * _MIB),
    "disk_gib": ("disk", lambda gib: int(gib * _GIB)),
    "timeout_boot_s": ("timeout", float),
}
"""Keywords of the mark, and how their values are made, by the names that the routes have for them."""


class Machines:
    """The machines of the catalog.

    Their folders say what there is; what this adds are starts that are under way, or failed.

    Attributes:
        quick: Threads for what only looks at files.
        long: Threads for requests to daemons.
        power: Threads for actions: who fills the others with commands that take long must not keep machines from being stopped.
        starts: Starts that are under way, or failed.
    """

    def __init__(self, options: Options) -> None:
        """Take the options; nothing is looked at yet."""
        self._options = options
        self._folder = options.root / "machines"
        self.quick, self.long, self.power = (Threads(most, waiting=_WAITING) for most in (_QUICK, _LONG, _POWER))
        self.starts = Starts(options.max_starts)
        self._all = Shared(self._look)

    # -- what there is ---------------------------------------------------------------------------------------------------------------

    async def all(self) -> list[dict[str, Any]]:
        """Return all machines, by their names."""
        return await self._all.get()

    async def _look(self) -> list[dict[str, Any]]:
        found = {record.name: record for record in await self.quick.run(self._records)}
        # A start that is under way has a record that says less, one that failed has none any more, unless somebody else has its name now.
        known = {record.name: record for record in self.starts if record.state == STARTING or record.name not in found}
        return [self.shown(record) for _, record in sorted((found | known).items())]

    def _records(self) -> list[Record]:
        return [record for kept in all_kept(self._folder) if (record := _record(kept)) is not None]

    async def one(self, name: str) -> dict[str, Any]:
        """Return a machine.

        Raises:
            Problem: There is no such machine.
        """
        return self.shown(await self.record(name))

    async def record(self, name: str) -> Record:
        """Return the record of a machine, or of a start that failed.

        Raises:
            Problem: There is no such machine.
        """
        if self.starts.is_under_way(name):
            return self.starts.get(name) or _missing(name)
        return await self.quick.run(lambda: _record(Kept(self._folder / name))) or self.starts.get(name) or _missing(name)

    async def kept(self, name: str) -> Kept:
        """Return a machine that has a folder, to ask its daemon.

        Raises:
            Problem: There is no such machine.
            CatalogError: It is being started, or could not be.
        """
        record = await self.record(name)
        kept = Kept(self._folder / name)
        if self.starts.is_under_way(name):
            raise CatalogError(f"the machine {name!r} is still starting")
        if not kept.folder.is_dir():
            raise CatalogError(f"the machine {name!r} could not be started: {record.reason}")
        return kept

    def shown(self, record: Record) -> dict[str, Any]:
        """Return a record as the routes show it."""
        memory, disk = record.spec.get("memory"), record.spec.get("disk")
        return {
            "id": record.name,
            "name": record.name,
            "state": "provisioning" if record.state == STARTING else record.state,
            "reason": record.reason,
            "node": self._options.node,
            "base_image": record.source,
            "since": record.since,
            "until": record.until,
            "backend": record.backend,
            "arch": record.spec.get("arch"),
            "vcpus": record.spec.get("cpus"),
            "mem_mib": None if memory is None else memory // _MIB,
            "disk_gib": None if disk is None else disk / _GIB,
            "user": record.spec.get("user"),
            "pid": record.pid,
            "ports": dict(record.ports),
        }

    # -- what is done with them ------------------------------------------------------------------------------------------------------

    async def create(self, new: NewMachine) -> dict[str, Any]:
        """Begin to start a new machine, and return it.

        Raises:
            SpecError: A keyword is invalid.
            CatalogError: The name is taken.
            Problem: There are too many machines.
        """
        keywords = _keywords(new)
        given: dict[str, Any] = {
            "machines": self._folder,
            "catalog": self._options.root,
            "source": new.base_image,
            "keywords": keywords,
            "settings": dict(self._options.settings),
            "folder": self._options.folder,
        }
        there = {each["name"] for each in await self.all() if each["state"] != "error" or Kept(self._folder / each["name"]).folder.is_dir()}
        if len(there) >= self._options.max_machines:
            raise Problem(HTTPStatus.CONFLICT, f"there are {len(there)} machines, and no more are made: remove some first")
        order = await self.quick.run(partial(new_order, **given, name=new.name))
        # From here on nothing is awaited until the start is noted, so two requests get two names.
        name = new.name or self._free_name(order.place.name)
        if (new.name is not None and name in there) or self.starts.is_under_way(name):
            raise CatalogError(f"there is a machine {name!r} already: remove it, or choose another name")
        texts = {key: str(value) if key in ("machines", "catalog", "folder") else value for key, value in given.items()}
        record = Record(name=name, source=new.base_image, spec=_known(keywords))
        return self.shown(self.starts.begin(record, {"new": texts | {"name": name}}))

    def _free_name(self, name: str) -> str:
        """Return a name that no start has which is under way: the folder of its machine may not be there yet."""
        stem, _, number = name.rpartition("-")
        stem, count = (stem, int(number)) if stem and number.isdigit() else (name, 1)
        while self.starts.is_under_way(name) or (self._folder / name).exists():
            count += 1
            name = f"{stem}-{count}"
        return name

    async def act(self, name: str, action: Action) -> dict[str, Any]:
        """Do something with a machine, and return it as it is then.

        Raises:
            CatalogError: Its state does not allow that.
            MachineError: It is not running, or does not answer.
        """
        kept = await self.kept(name)
        if action.action == "start":
            return self._start_again(kept, await self.record(name), action.label)
        if action.action == "stop":
            await self.power.run(partial(kept.stop, now=action.now))
            if action.cleanup_disks:
                await self.quick.run(partial(_clean_disk, kept))
        else:
            request = {"verb": action.action} | ({"label": action.label} if action.label else {})
            await self.power.run(partial(kept.ask, request))
        return await self.one(name)

    def _start_again(self, kept: Kept, record: Record, label: str | None) -> dict[str, Any]:
        if kept.is_held:
            raise CatalogError(f"the machine {kept.name!r} runs already")
        if label is not None:
            kept.snapshot_folder(label)  # for its error
        elif not kept.can_start_again:
            raise CatalogError(f"the machine {kept.name!r} has no disk of its own to start from: {record.reason}")
        again = {"label": label, "settings": dict(self._options.settings)}
        return self.shown(self.starts.begin(record, {"folder": str(kept.folder), "again": again}))

    async def remove(self, name: str) -> None:
        """End a machine at once, and remove all of it; a start that is under way is cancelled.

        Raises:
            Problem: There is no such machine.
            MachineError: Somebody else is starting it.
        """
        await self.record(name)
        await self.starts.cancel(name)
        self.starts.forget(name)
        await self.power.run(partial(_remove, Kept(self._folder / name)))


def _record(kept: Kept) -> Record | None:
    try:
        return kept.record()
    except FileNotFoundError:
        return None


def _missing(name: str) -> Record:
    raise Problem(HTTPStatus.NOT_FOUND, f"there is no machine {name!r}", "CatalogError")


def _keywords(new: NewMachine) -> dict[str, Any]:
    """Return the keywords of the mark for a new machine."""
    given = new.model_dump(exclude_none=True, exclude={"base_image", "name"})
    keywords = {key: value for key, value in given.items() if key not in _RENAMED}
    if "source" in keywords:
        raise SpecError("source: here it is called base_image")
    for key, (keyword, convert) in _RENAMED.items():
        if key in given:
            if keyword in keywords:
                raise SpecError(f"{keyword}= and {key}= mean the same: give one of them")
            keywords[keyword] = convert(given[key])
    _check_files(keywords.get("files"))
    return keywords


def _check_files(files: object) -> None:
    """Refuse content that comes from a file of this computer: it is not the client's."""
    if isinstance(files, Mapping):
        for path, content in files.items():
            if isinstance(content, Mapping) and "host" in content:
                raise SpecError(f"files={path!r}: takes text or b64, and perhaps a mode")


def _known(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a machine before it has a record."""
    return {key: keywords[key] for key in ("arch", "cpus", "user") if key in keywords} | {
        key: value for key in ("memory", "disk") if isinstance(value := keywords.get(key), int)
    }


def _clean_disk(kept: Kept) -> None:
    """Remove the disk of a machine that is off.

    Raises:
        CatalogError: It was started again.
    """
    with tried(kept.folder) as is_ours:
        if not is_ours:
            raise CatalogError(f"the machine {kept.name!r} was just started again: its disk was not removed")
        shutil.rmtree(kept.folder / DISK, ignore_errors=True)


def _remove(kept: Kept) -> None:
    if kept.folder.is_dir():
        kept.stop(now=True)
        if not kept.discard():
            raise CatalogError(f"the machine {kept.name!r} was just started again: nothing of it was removed")
