"""Shared state of one provisioner: catalog, backend, settings and counts."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle.errors import CatalogError, VMBottleError
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.generations import Holds
from pytest_vmbottle.spec.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_vmbottle.backends.port import Backend, Capabilities, Console, Start
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.spec import MachineSpec
    from pytest_vmbottle.timeline import Timeline
    from pytest_vmbottle.travel.run_registry import RunRegistry

__all__ = ["BUILD_SECONDS", "Context", "Remains", "Settings", "Tally"]

log = logging.getLogger(__name__)

BUILD_SECONDS = 1800.0
"""Seconds that the build of an image or a pack may take, in this process or in the one that it waits for."""


@attrs.define(kw_only=True)
class Remains:
    """Remains of a machine that has ended or never became ready, as long as its folder is there.

    Attributes:
        id: The machine's id.
        spec: Its spec.
        source: The boot source of its first start; None if it is unknown.
        backend: The backend's name.
        made_by: The backend's name, version and accelerator.
        image: The sha256 of its image.
        folder: Its folder.
        console: Its console.
        timeline: The record of what happened to it.
        argv: The hypervisor's command line, if there was one.
        failed: Whether an error or an interruption ended it.
    """

    id: str
    spec: MachineSpec
    source: Start | None
    backend: str
    made_by: str
    image: str
    folder: Path
    console: Console
    timeline: Timeline
    argv: Sequence[str] = ()
    failed: bool = False


@attrs.frozen(kw_only=True)
class Settings:
    """Settings of a run.

    Attributes:
        timeout_factor: The factor of all time-outs.
        rebuild_before: Packs made before this time, in seconds since 1970, are made again.
        report: Function that gets a line about long work.
        warn: Function that gets a warning.
        ready: Function that is called with a machine before anybody gets it.
        stopping: Function that is called with a machine before it is ended.
        ended: Function that is called with what any machine leaves, also one that built a pack or did not start, before its folder goes.
        declared: The images that the project declares, by name; they take precedence over those of the catalog.
        memory_budget: Bytes of RAM that all machines of the catalog may have together; by default a part of this host's available memory.
        memory_seconds: Seconds to wait for memory at most.
        retries: Number of retries, with a fresh machine, if a machine could not be started.
        registry: The repository that is asked for packs and images before they are made; empty for none.
        registry_push: Whether what is made goes there.
        spares: The number of machines that may be made before they are asked for.
    """

    timeout_factor: float = 1.0
    rebuild_before: float | None = None
    report: Callable[[str], None] = log.info
    warn: Callable[[str], None] = log.warning
    ready: Callable[[Machine], None] = lambda _: None
    stopping: Callable[[Machine], None] = lambda _: None
    ended: Callable[[Remains], None] = lambda _: None
    declared: Mapping[str, DeclaredImage] = attrs.field(factory=dict)
    memory_budget: int | None = None
    memory_seconds: float = BUILD_SECONDS
    retries: int = 0
    registry: str = ""
    registry_push: bool = False
    spares: int = 0


@attrs.define
class Tally:
    """Counts of machines and packs, and seconds of waiting.

    `waited` is the time until machines were ready, `queued` the part of it spent waiting for memory. `spares` were made before they were
    asked for, and `spared` of them were used.
    """

    restored: int = 0
    booted: int = 0
    built: int = 0
    reused: int = 0
    waited: float = 0.0
    queued: float = 0.0
    retried: int = 0
    pulled: int = 0
    pushed: int = 0
    spares: int = 0
    spared: int = 0


class Context:
    """One backend and one catalog, with the folders that a run holds.

    Its machines hold theirs on their own.
    """

    def __init__(self, catalog: Catalog, backend: Backend, *, name: str, settings: Settings) -> None:
        self.catalog, self.backend, self.name, self.settings = catalog, backend, name, settings
        self.tally = Tally()
        self.holds = Holds()

    def close(self) -> None:
        """Release everything that is held; may be called again."""
        self.holds.close()
        self.backend.close()

    @cached_property
    def registry(self) -> RunRegistry | None:
        """The registry of the run, if it has one."""
        if not self.settings.registry:
            return None
        # Imported here and not above: most runs have none, and what it takes takes long.
        from pytest_vmbottle.travel.run_registry import RunRegistry, open_exchange  # noqa: PLC0415

        settings = self.settings
        exchange = open_exchange(Reference.parse(settings.registry), self.catalog, self.backend.fingerprint, settings.report)
        return RunRegistry(exchange, push=settings.registry_push, replace=settings.rebuild_before is not None, warn=settings.warn)

    @property
    def capabilities(self) -> Capabilities:
        """The backend's capabilities on this host."""
        return self.backend.probe()

    def label(self, spec: MachineSpec) -> str:
        """Describe the backend that runs machines of a spec, in words."""
        able = self.capabilities
        return f"{self.name} {able.version} {able.accelerator if spec.arch == host_arch() else f'{spec.arch} emulated'}"

    def deadline(self, seconds: float = BUILD_SECONDS) -> Deadline:
        """Return the deadline of a step that may take as long as a build."""
        return Deadline(seconds * self.settings.timeout_factor)

    @contextmanager
    def alone(self, lock: str, label: str, seconds: float = BUILD_SECONDS) -> Iterator[Callable[[str], None]]:
        """Hold a lock of the catalog for a block.

        The block gets a function for progress lines, which reach this run and the processes that wait.
        """
        report = self.settings.report
        with self.catalog.lock(lock, deadline=self.deadline(seconds), waiting=report, label=label) as tell:

            def both(line: str) -> None:
                report(line)
                tell(line)

            yield both

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of the file system into a `CatalogError` with a hint."""
        try:
            yield
        # Already a sentence; some of these errors are OSErrors too.
        except VMBottleError:
            raise
        except OSError as error:
            root = self.catalog.root
            hint = "make room (vmbottle pack prune), or choose another folder with --vm-catalog"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                hint = "raise the limit on open files of this process (ulimit -n), or of this host (fs.file-max)"
            raise CatalogError(f"the catalog {root} cannot be used: {error.strerror or error}; {hint}") from error
