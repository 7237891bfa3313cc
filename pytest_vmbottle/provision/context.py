"""What all that provides machines works with: a catalog, a backend, what a run was told, and what it has done."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.backend import Keeping
from pytest_vmbottle.errors import CatalogError, VMBottleError
from pytest_vmbottle.generations import Holds
from pytest_vmbottle.spec import host_arch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.backend import Backend, Capabilities
    from pytest_vmbottle.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage
    from pytest_vmbottle.machine import Machine
    from pytest_vmbottle.spec import MachineSpec

__all__ = ["BUILD_SECONDS", "Context", "Settings", "Tally"]

log = logging.getLogger(__name__)

BUILD_SECONDS = 1800.0
"""How long an image or a pack may take to be made, by this process or by the one that is waited for."""


@attrs.frozen(kw_only=True)
class Settings:
    """What a run was told.

    Attributes:
        timeout_factor: What every time-out is multiplied with.
        rebuild_before: Packs made before this moment, in seconds since 1970, are made again.
        report: Takes a line about long work.
        warn: Takes a sentence that somebody should read.
        ready: Called with a machine before anybody gets it.
        stopping: Called with a machine before it is ended.
        declared: The images that the project declares, by name; they go before those of the catalog.
        memory_budget: Bytes of RAM that all machines of the catalog may have together; by default a share of what this host can spare.
        retries: How often a machine that could not be provided is tried again, on a fresh one.
    """

    timeout_factor: float = 1.0
    rebuild_before: float | None = None
    report: Callable[[str], None] = log.info
    warn: Callable[[str], None] = log.warning
    ready: Callable[[Machine], None] = lambda _: None
    stopping: Callable[[Machine], None] = lambda _: None
    declared: Mapping[str, DeclaredImage] = attrs.field(factory=dict)
    memory_budget: int | None = None
    retries: int = 0


@attrs.define
class Tally:
    """What was done: counts, and seconds spent waiting for machines, and those of them in which they waited for memory."""

    poured: int = 0
    booted: int = 0
    built: int = 0
    reused: int = 0
    waited: float = 0.0
    queued: float = 0.0
    retried: int = 0


class Context:
    """One backend and one catalog, with what a run holds of it: its machines have holds of their own."""

    def __init__(self, catalog: Catalog, backend: Backend, *, name: str, settings: Settings) -> None:
        self.catalog, self.backend, self.name, self.settings = catalog, backend, name, settings
        self.tally = Tally()
        self.holds = Holds()

    def close(self) -> None:
        """Gives up what is held; may be called again."""
        self.holds.close()
        if isinstance(self.backend, Keeping):
            self.backend.close()

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do here."""
        return self.backend.probe()

    def label(self, spec: MachineSpec) -> str:
        """What machines of a spec are run by, in words."""
        able = self.capabilities
        return f"{self.name} {able.version} {able.accelerator if spec.arch == host_arch() else f'{spec.arch} emulated'}"

    def deadline(self, seconds: float = BUILD_SECONDS) -> Deadline:
        """The end of something that may take as long as a build."""
        return Deadline(seconds * self.settings.timeout_factor)

    @contextmanager
    def alone(self, lock: str, label: str, seconds: float = BUILD_SECONDS) -> Iterator[Callable[[str], None]]:
        """Does something as the only one; the block gets what takes a line about how far it is, for this run and for those who wait."""
        report = self.settings.report
        with self.catalog.lock(lock, deadline=self.deadline(seconds), waiting=report, label=label) as tell:

            def both(line: str) -> None:
                report(line)
                tell(line)

            yield both

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Says what a failure of the file system means here."""
        try:
            yield
        except VMBottleError:
            raise
        except OSError as error:
            root = self.catalog.root
            hint = "make room (vmbottle pack prune), or choose another folder with --vm-catalog"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                hint = "raise the limit on open files of this process (ulimit -n), or of this host (fs.file-max)"
            raise CatalogError(f"the catalog {root} cannot be used: {error.strerror or error}; {hint}") from error
