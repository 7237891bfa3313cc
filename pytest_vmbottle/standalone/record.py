"""Records of machines without pytest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.host import records
from pytest_vmbottle.host.supervisor import Identity

__all__ = ["ERROR", "OFF", "PAUSED", "RUNNING", "STARTING", "STOPPED", "Record"]

STARTING, RUNNING, PAUSED, STOPPED, OFF, ERROR = "starting", "running", "paused", "stopped", "off", "error"


@attrs.frozen(kw_only=True)
class Record:
    """Record of a machine that runs, or ran, without pytest.

    Attributes:
        name: The machine's name.
        source: The source that it was started from.
        state: `"starting"`, `"running"`, `"paused"`, `"stopped"`, `"off"`: the guest powered itself off, or `"error"`: it was lost, or
            ended otherwise than asked.
        reason: The reason why it does not run, or what is wrong with it; else empty.
        since: The time when it got into this state, or was found dead, in seconds since 1970.
        keeper: The process id of its daemon.
        spec: Its main properties: `arch`, `cpus`, `memory`, `disk`, `network`, `user`.
        backend: The backend that runs it.
        id: An identifier that is unique on this host.
        pid: The hypervisor's process id.
        ports: Forwarded ports of the guest, with the host's ports on 127.0.0.1.
        argv: The hypervisor's command line.
        until: The time when it is ended, in seconds since 1970; None if it runs until it is stopped.
    """

    name: str
    source: str
    state: str = STARTING
    reason: str = ""
    since: float = attrs.field(factory=time.time)
    keeper: Identity | None = None
    spec: Mapping[str, Any] = attrs.field(factory=dict)
    backend: str = ""
    id: str = ""
    pid: int | None = None
    ports: Mapping[str, int] = attrs.field(factory=dict)
    argv: tuple[str, ...] = ()
    until: float | None = None

    @property
    def is_on(self) -> bool:
        """Tell whether the machine has a process, or soon will."""
        return self.state in (STARTING, RUNNING, PAUSED)

    def ended(self, state: str, reason: str) -> Record:
        """Return the record of the same machine without a process, from now on."""
        return attrs.evolve(self, state=state, reason=reason, since=time.time(), ports={}, pid=None)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what `write` has written.

        Raises:
            FileNotFoundError: There is no record.
            Damaged: The record is damaged.
        """

        def make(facts: Mapping[str, Any]) -> Record:
            keeper = Identity(**facts["keeper"]) if facts["keeper"] else None
            return cls(**{**facts, "keeper": keeper, "argv": tuple(facts["argv"])})

        return records.read_as(path, make)

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        keeper = None if self.keeper is None else self.keeper._asdict()
        records.write(path, attrs.asdict(self) | {"keeper": keeper})
