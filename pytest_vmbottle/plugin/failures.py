"""A failed test explains itself: sections of its report, and its artifacts."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.plugin.artifacts import TestOutcome
from pytest_vmbottle.plugin.attachments import attach
from pytest_vmbottle.plugin.evidence import ANSWER, Evidence, gather, sections
from pytest_vmbottle.shown import printable
from pytest_vmbottle.timeline import now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pytest

    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.plugin.session import Session

__all__ = ["PROPERTY", "explain", "keep_timed_out", "keep_unreported"]

PROPERTY = "vmbottle_artifacts"
"""Property of a test, in JUnit's XML too: the folder of its artifacts."""
_LAST_SECONDS = 5.0
"""Seconds for the artifacts of a process that is about to end itself."""
# Characters of a traceback or a section in the artifacts.
_TEXT = 256 << 10


def explain(item: pytest.Item, report: pytest.TestReport, session: Session) -> None:
    """Add to a report what explains a failure, and keep the test's artifacts if the options say so."""
    if report.failed:
        # Noted before anything that may fail: the hook `pytest_vmbottle_machine_stopping` is told of it.
        session.failed.update(machine.id for machine in session.machines)
    leaves, lives = (_is_wanted(wish, report) for wish in (session.options.artifacts, session.options.keep))
    # The end of the test belongs to what was kept of it.
    completes = session.opened is not None and report.when == "teardown"
    # Guests are asked only where it is of use: each answer costs seconds at worst.
    found = _gather(session, ask=report.failed or leaves) if report.failed or leaves or completes else []
    if report.failed:
        # Before the artifacts are written, which have these sections too.
        report.sections += sections(found, since=session.began, told=report.longreprtext)
    if leaves or completes:
        _keep(item, report, session, found)
    if report.failed and session.options.capsule == "failed" and report.when != "teardown" and session.machines:
        from pytest_vmbottle.plugin.encapsulating import save_capsule

        crash = getattr(report.longrepr, "reprcrash", None)
        told = save_capsule(session, item.nodeid, str(crash.message if crash else report.longrepr).partition("\n")[0])
        report.sections += [("capsule", told)] if told else []
    if lives:
        # Imported here: few runs keep machines, and the clients of daemons are many modules.
        from pytest_vmbottle.plugin.keeping import keep

        lines = [keep(session, machine, item.name) for machine in session.machines]
        report.sections += [("kept machines", "\n".join(lines))] if lines else []


def _is_wanted(wish: str, report: pytest.TestReport) -> bool:
    """Tell whether an option with the values `never`, `failed` and `always` takes this report: one of each test."""
    # A passed test has three reports, and that of the call is the one that stands for the test.
    return wish != "never" and (report.failed or (wish == "always" and report.when == "call"))


def keep_unreported(session: Session, error: str, stack: str = "") -> None:
    """Keep the artifacts of a test that ends without a report, without asking its guests: there may be little time."""
    # None without machines: there is nothing that only we could tell.
    if session.test is not None and (session.machines or session.ended):
        facts = {"nodeid": session.test.nodeid, "outcome": "failed", "phase": session.phase, "error": error}
        _write(session, _outcome(session, **facts, traceback=printable(stack, _TEXT)), [*_gather(session, ask=False), *session.ended])
        _send(session)


def keep_timed_out(session: Session, error: str, thread: int, after: Callable[[], object]) -> None:
    """Keep the artifacts of a test whose process is about to end itself, for some seconds at most.

    Args:
        session: The run.
        error: The reason.
        thread: The thread that runs the test.
        after: Function that is called when they are written, within the same time.
    """

    def work() -> None:
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - the only way to the stack of another thread
        keep_unreported(session, error, "".join(traceback.format_stack(frame)))
        after()

    # In a thread of its own, because a file system or a monitor that hangs must not keep the process for ever.
    worker = Thread(target=work, name="vmbottle-artifacts", daemon=True)
    worker.start()
    worker.join(_LAST_SECONDS)


def _gather(session: Session, *, ask: bool) -> list[Evidence]:
    # One deadline for all: a run with many machines that hang must not wait for each of them.
    deadline = Deadline(ANSWER)
    return [gather(machine, since=session.began, deadline=deadline, ask=ask) for machine in session.machines]


def _outcome(session: Session, **facts: Any) -> TestOutcome:
    known: dict[str, Any] = {"traceback": "", "sections": [], "began": session.began, "ended": now()}
    # The variable that pytest-xdist sets in its workers.
    return TestOutcome(**{**known, **facts}, worker=os.environ.get("PYTEST_XDIST_WORKER", ""))


def _keep(item: pytest.Item, report: pytest.TestReport, session: Session, found: list[Evidence]) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    error = str(getattr(crash, "message", "") or report.longrepr or "")
    outcome = _outcome(
        session,
        nodeid=item.nodeid,
        outcome=report.outcome,
        phase=report.when,
        error=printable(error.partition("\n")[0]),
        traceback=printable(report.longreprtext, _TEXT),
        sections=[(title, printable(text, _TEXT)) for title, text in report.sections],
    )
    is_new = session.opened is None
    places = _write(session, outcome, [*found, *session.ended])
    if session.opened is None or places is None:
        return
    folder = session.opened.path
    # Files of hooks come after ours, into folders that are complete already.
    for evidence, place in places:
        if evidence.machine is not None:
            _add_files(session, evidence.machine, place, report)
    # The report of a teardown that passed has no row of its own there.
    if is_new or report.failed:
        attach(session.config, folder, report)
    _send(session)
    shown = session.shown_path(folder)
    if report.failed:
        report.sections.append(("artifacts", shown))
    # The report has a copy of the item's properties, and JUnit's XML is made of the last report.
    for properties in (item.user_properties, report.user_properties):
        if (PROPERTY, shown) not in properties:
            properties.append((PROPERTY, shown))


def _send(session: Session) -> None:
    """Send what is written of the test to a controller on another host, before the report of it."""
    if session.hosted is not None and session.opened is not None:
        with suppress(OSError):
            session.hosted.send_files(session.opened.path)


def _write(session: Session, outcome: TestOutcome, found: Sequence[Evidence]) -> list[tuple[Evidence, Path]] | None:
    """Write or complete a test's artifacts, and return the folders of machines that had none before; None if they cannot be written."""
    try:
        opened = session.opened = session.opened or session.artifacts.test_folder(outcome.nodeid)
        places = [(evidence, opened.add(evidence)) for evidence in found]
        opened.finish(outcome)
        return [(evidence, place) for evidence, place in places if place is not None]
    # Artifacts that cannot be written must not hide the test's own error.
    except (OSError, SpecError) as error:
        session.say(f"the artifacts of {outcome.nodeid} could not be written: {error}")
        return None


def _add_files(session: Session, machine: Machine, folder: Path, report: pytest.TestReport) -> None:
    try:
        session.config.hook.pytest_vmbottle_artifacts(machine=machine, folder=folder, report=report)
    # A hook's error must not hide the test's own, either.
    except Exception as error:
        session.say(f"a hook failed while the artifacts of the machine {machine.name!r} were written: {error!r}")
