"""Evidence of a failed test: what its machines did, and what their guests say of themselves."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.errors import MachineError, VMBottleError
from pytest_vmbottle.report.words import describe_event
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.shown import printable
from pytest_vmbottle.timeline import now

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_vmbottle.backends.port import Start
    from pytest_vmbottle.host.deadline import Deadline
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.provision.context import Remains

__all__ = ["ANSWER", "Evidence", "gather", "read_remains", "sections"]

ANSWER = 5.0
"""Seconds that all guests of a failed test have together to answer questions."""
_LINES, _COMMANDS, _OUTPUT = 40, 10, 6
"""Most lines of a section, commands in it, and lines of a failed command's output."""
_CHARACTERS = 200
# What the test did is one section, and these have sections of their own or none.
_ASIDE = ("console", "metrics", "phase", "answer")
"""Kinds of events that are no acts of the test."""


@attrs.frozen(kw_only=True)
class Evidence:
    """Evidence of one machine.

    Attributes:
        remains: What it leaves, or would leave if it ended now.
        machine: The machine; None if it has ended, or never became ready.
        pack: Key, kind and name of the pack that it was made from; None for one that booted from an image.
        console: Its console, since the folder with it goes.
        events: Its events since the test began.
        units: Lines about units that failed or were restarted since the test began.
        journal: The guest's journal of this boot; empty if it was not asked for, or did not come in time.
        silent: The reason that the guest was not asked or did not answer; empty if it did.
    """

    remains: Remains
    machine: Machine | None = None
    pack: Mapping[str, str] | None
    console: str
    events: list[dict[str, Any]]
    units: Sequence[str] = ()
    journal: str = ""
    silent: str = ""

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.remains.spec.name

    def note(self, kind: str, **fields: object) -> None:
        """Add an event that a machine which has ended cannot record any more."""
        self.events.append({"machine": self.name, "time": now(), "kind": kind, **fields})


def gather(machine: Machine, *, since: float, deadline: Deadline, ask: bool) -> Evidence:
    """Collect what is known of a machine.

    Args:
        machine: The machine.
        since: The start of the test, in seconds since 1970.
        deadline: The end of all questions.
        ask: Whether to ask the guest too.
    """
    # Before the guest is asked: our own questions are no acts of the test.
    found = attrs.evolve(read_remains(_remains(machine), since=since), machine=machine)
    if not ask:
        return found
    from pytest_vmbottle.machine import questions

    try:
        # A guest that is off, paused or dead would cost the whole time for questions, and answer nothing.
        if machine.state != "running":
            return attrs.evolve(found, silent=f"the machine is {machine.state}, and was not asked for its journal")
        journal = questions.journal(machine, deadline=deadline)
    # Whatever is wrong with the machine must not hide the test's own error, not even a hypervisor that cannot tell its state.
    except VMBottleError as error:
        said = "it was not read in time" if isinstance(error, CommandTimeout) else str(error).partition("\n")[0]
        return attrs.evolve(found, silent=f"no journal: {said}")
    return attrs.evolve(found, units=questions.troubles_in(journal, since=since), journal=journal)


def read_remains(remains: Remains, *, since: float) -> Evidence:
    """Read what a machine leaves while its folder is there."""
    # The pack too: one that could not be restored is quarantined as soon as the machine has gone.
    return Evidence(remains=remains, pack=_pack(remains.source), console=remains.console.text, events=remains.timeline.events(since))


def _pack(source: Start | None) -> Mapping[str, str] | None:
    from pytest_vmbottle.catalog import packs

    # A pack without RAM is no more than the uppermost disk of the machine.
    top = source.disks[-1].path.parent if source and source.disks else None
    folder = (source and source.saved) or top
    if folder is not None:
        # An image's folder has no manifest.
        with suppress(OSError, VMBottleError):
            manifest = packs.read(folder).manifest
            return {"key": manifest.key, "kind": str(manifest.kind), "name": manifest.name}
    return None


def _remains(machine: Machine) -> Remains:
    from pytest_vmbottle.provision.context import Remains

    lifecycle, argv = machine.lifecycle, ()
    with suppress(VMBottleError):  # it may be off
        argv = getattr(lifecycle.instance, "argv", ())
    return Remains(
        id=machine.id,
        spec=machine.spec,
        source=lifecycle.source,
        backend=machine.backend,
        made_by=lifecycle.made_by,
        image=lifecycle.image,
        folder=machine.console.path.parent,
        console=machine.console,
        timeline=lifecycle.timeline,
        argv=argv,
    )


def sections(found: Sequence[Evidence], *, since: float, told: str) -> Iterator[tuple[str, str]]:
    """Yield titles and texts for the report of a test.

    Args:
        found: The evidence of its machines.
        since: The start of the test.
        told: The text of the report so far; what stands in it is not repeated.
    """
    for evidence in found:
        name = evidence.name
        for title, lines in (
            ("last commands", _commands(evidence.events, since)),
            ("units that failed or were restarted", evidence.units),
            ("trouble of the kernel", _troubles(evidence)),
            ("console", [str(event["text"]) for event in evidence.events if event["kind"] == "console"]),
            ("silence", [evidence.silent] if evidence.silent else []),
        ):
            # Cut before it is made printable, which costs time by the character.
            shown = [printable(line[:_CHARACTERS]) for line in lines[-_LINES:]]
            # A section of which the error has every line would only make the report longer.
            if any(line.strip() and line.strip() not in told for line in shown):
                yield f"{name}: {title}", "\n".join(shown)


def _commands(events: Sequence[Mapping[str, Any]], since: float) -> list[str]:
    lines: list[str] = []
    # The last ones, since a failure is mostly explained by what was done just before it.
    for event in [event for event in events if event["kind"] not in _ASIDE][-_COMMANDS:]:
        lines.append(f"{event['time'] - since:+9.2f} s  {describe_event(event)}")
        if event.get("status"):
            said = f"{event.get('stdout', '')}\n{event.get('stderr', '')}".strip().splitlines()
            lines += [f"             | {line}" for line in said[-_OUTPUT:]]
    return lines


def _troubles(evidence: Evidence) -> list[str]:
    from pytest_vmbottle.backends.kernel_watch import troubles

    with suppress(MachineError):
        # From the events of this test. A shared machine's console has what earlier tests caused.
        console = "\n".join(str(event["text"]) for event in evidence.events if event["kind"] == "console")
        found = troubles(console.encode())
        panic = evidence.machine.panic if evidence.machine else None
        return list(dict.fromkeys([*found, *([panic] if panic else [])]))
    return []
