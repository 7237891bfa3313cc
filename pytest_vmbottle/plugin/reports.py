"""Reports of a run about its machines, collected from all of its processes."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.plugin.collection import uses_machine
from pytest_vmbottle.plugin.infra import PROPERTY, cause_of, cause_told, note
from pytest_vmbottle.plugin.session import DURATIONS, SESSION, Session
from pytest_vmbottle.shown import coloured, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Clock", "InterruptedTest", "LastWords", "Outcomes"]

_OUR_MODULES = re.compile(r"\Apytest_vmbottle(?:\.[a-z_]+)+\.(?=[A-Z])")
_WORTH_TELLING = 1.0
"""Seconds of waiting for memory below which the summary does not mention it."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where to write its progress messages, and the id of the run."""
    # All processes of a run have one id, by which they share the folder of artifacts.
    node.workerinput["vmbottle_run"] = node.config.stash[SESSION].run
    # Files of this host: see `hosts` for workers on others.
    if node.config.stash[SESSION].options.hosts:
        return
    capture = node.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        # pytest-xdist shows nothing of a worker's output while tests run, so workers write to the controller's stderr.
        # A path, because a descriptor does not cross to a process that was not forked from this one. It is of a duplicate, which no
        # capturing replaces.
        node.workerinput["vmbottle_terminal"] = f"/proc/{os.getpid()}/fd/{os.dup(2)}"
    node.workerinput["vmbottle_flag"] = node.config.stash[SESSION].flag()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Install the controller's signal handlers, if its workers have machines."""
    ours = node.config.stash[SESSION]
    # Called when a worker has collected and before it gets a test, so the controller has its handlers before the first machine starts.
    if ours.is_flagged:
        ours.interruption.install()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send a worker's data to the controller, which refuses the wrong marks that its workers found."""
    ours = session.config.stash[SESSION]
    output = getattr(session.config, "workeroutput", None)
    # The controller or the only process. Workers leave it to the controller, which ends after them.
    if output is None:
        # Before the ledger is written: what is reclaimed here belongs to it.
        ours.clean_up()
    ours.collect()
    if output is not None:
        # pytest-xdist takes plain values only (execnet), so everything here is a dictionary, a list, a text or a number.
        output["vmbottle"] = {
            "tallies": ours.tallies,
            "told": list(ours.told),
            "problems": list(ours.problems),
            "ledger": ours.ledger.sent(),
            "kept": ours.kept,
            "capsules": ours.capsules,
        }
    # No tests collected is how workers refuse: see `collection._refuse`.
    elif ours.problems and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ours.usage_error()
    # The exit status of a run with failed tests is left alone: a leak is the lesser news.
    elif ours.ledger.left and session.exitstatus == pytest.ExitCode.OK and ours.options.fail_on_leak:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Collect a worker's data, and clean up after a worker that crashed."""
    # A worker that crashed has sent none.
    output = getattr(node, "workeroutput", {}).get("vmbottle", {})
    ours = node.config.stash[SESSION]
    # Its machines end by its supervisor; folders and records are removed here.
    if error:
        ours.clean_up()
    ours.tallies.extend(output.get("tallies", ()))
    ours.told.update(dict.fromkeys(output.get("told", ())))
    ours.problems.update(dict.fromkeys(output.get("problems", ())))
    ours.ledger.add(output.get("ledger", {}))
    ours.kept += output.get("kept", ())
    ours.capsules += output.get("capsules", ())


def _spared(total: Mapping[str, float]) -> str:
    if not total["spares"]:
        return ""
    unused = total["spares"] - total["spared"]
    return f" ({total['spared']:.0f} of them made beforehand{f', {unused:.0f} in vain' if unused else ''})"


def _exchanged(total: Mapping[str, float]) -> str:
    return "".join(f", {total[what]:.0f} {what}" for what in ("pulled", "pushed") if total[what])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report the run's machines and packs."""
    ours = config.stash[SESSION]
    total = {key: sum(tally[key] for tally in ours.tallies) for key in (ours.tallies or [{}])[0]}
    if any(total.values()):
        # Without workers this was told after the collection, of which the controller has none.
        if hasattr(config.option, "dist") and config.option.dist != "no":
            for line in ours.told:
                terminalreporter.write_line(printable(line))
        terminalreporter.write_line(
            f"vmbottle: {_counted(total['restored'], 'machine')} restored{_spared(total)}, {total['booted']:.0f} booted; "
            f"{_counted(total['built'], 'pack')} built, {total['reused']:.0f} reused{_exchanged(total)}; "
            f"{total['waited']:.1f} s spent waiting for machines"
            + (f", {total['queued']:.1f} s of it for memory" if total["queued"] >= _WORTH_TELLING else "")
        )
    if ours.options.artifacts != "never" and (ours.has_machines or ours.is_flagged):
        for line in _write_report(ours):
            terminalreporter.write_line(printable(f"vmbottle: {line}"))
    for line in _lasting(ours):
        terminalreporter.write_line(printable(f"vmbottle: {line}"))
    infra = ours.infra.summary(int(total.get("retried", 0)))
    if infra:
        terminalreporter.write_line(f"vmbottle: {infra}", red=True)


def _lasting(session: Session) -> Iterator[str]:
    """Yield the commands for what the run leaves on purpose."""
    yield from (f"kept for {session.options.keep_seconds / 3600:.3g} h: {command}" for command in session.kept)
    yield from (f"as it was when it failed: {command}" for command in session.capsules)


def _counted(number: float, what: str) -> str:
    return f"{number:.0f} {what}{'' if number == 1 else 's'}"


def _write_report(session: Session) -> Iterator[str]:
    """Write the report of the run, if it left artifacts, and yield lines that say where it is."""
    # Imported here: a run that leaves no artifacts loads no writer of reports.
    from pytest_vmbottle.report.page import write_page
    from pytest_vmbottle.report.run import read_run
    from pytest_vmbottle.report.trace_event import write_trace

    folder = session.artifacts_folder
    if not session.artifacts.are_ours:
        return
    try:
        tests = read_run(folder)
        write_page(tests, folder / "index.html", title=f"Tests with machines of {session.config.rootpath.name}")
        write_trace(tests, folder / "trace.json")
    # The tests have ended, and their outcomes count more than a report about them.
    except (OSError, VMBottleError) as error:
        yield f"the report could not be written to {folder}: {error}"
        return
    yield f"artifacts of {_counted(len(tests), 'test')}: {session.shown_path(folder / 'index.html')}"


class LastWords:
    """Hook that reports the ledger of a run, after all other summaries."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
        """Report what the run made, kept, reclaimed and left behind."""
        # The others first: a leak is the last word of a run.
        yield
        for line in config.stash[SESSION].ledger.lines():
            terminalreporter.write_line(printable(f"vmbottle: {line}"), red=line.startswith("LEAK"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Report a machine that could not be started by its cause, without our own stack."""
    host = item.config.stash[SESSION].host
    cause = cause_of(call.excinfo.value if call.excinfo else None, host)
    advice = _advice(call.excinfo.value) if call.excinfo else ""
    if call.excinfo is not None and not item.config.option.fulltrace:
        from pytest_vmbottle.plugin.tracebacks import hide_our_frames

        # Before the report is made, which renders the traceback.
        hide_our_frames(call.excinfo.value)
    # Before the report is made, which copies the properties of the item.
    if cause and (PROPERTY, cause) not in item.user_properties:
        item.user_properties.append((PROPERTY, cause))
    report: pytest.TestReport = yield  # type: ignore[assignment]
    # The report has no exception, only its text: what other processes need of it is noted here.
    note(report, call.excinfo.value if call.excinfo else None, host)
    if call.when == "call":
        _fail_for_panics(report, item.config.stash[SESSION])
    if (
        call.when == "setup"
        and call.excinfo is not None
        and isinstance(call.excinfo.value, VMBottleError)
        and not item.config.option.fulltrace
    ):
        lines = [f"{type(call.excinfo.value).__name__}: {call.excinfo.value}", f"host: {host}" if host else "", advice]
        report.longrepr = "\n".join(filter(None, lines))
    if uses_machine(item):
        # Before the report is made safe, as what is added here is a guest's text, too.
        _explain(item, report, item.config.stash[SESSION])
        _make_safe(report)
    return report  # type: ignore[return-value]


def _advice(error: BaseException) -> str:
    # Imported here and not above: a run whose tests pass pays nothing for it.
    from pytest_vmbottle.plugin.advice import advise

    return advise(error)


def _explain(item: pytest.Item, report: pytest.TestReport, session: Session) -> None:
    session.note_phase(report.when or "", report.outcome)
    if report.failed or session.opened or "always" in (session.options.artifacts, session.options.keep):
        # Imported here and not above: a run whose tests pass pays nothing for it.
        from pytest_vmbottle.plugin.failures import explain

        explain(item, report, session)
    if report.when == "teardown":
        # An interruption between two tests is none of the test that has ended.
        session.forget()


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Set the timer of pytest-timeout's method `thread`, which ends the process at once, so that artifacts are written before."""
    session = item.config.stash[SESSION]
    if settings.method != "thread" or session.options.artifacts == "never" or not uses_machine(item):
        return None
    # Loaded already, since it has called this hook; it has no types.
    timeouts: Any = sys.modules["pytest_timeout"]
    test_thread = threading.get_ident()

    def end() -> None:
        try:
            # By the same question that decides whether the process ends; older versions always ask it.
            if getattr(settings, "disable_debugger_detection", False) or not timeouts.is_debugging():
                from pytest_vmbottle.plugin.failures import keep_timed_out

                error = f"Timeout (>{settings.timeout}s) from pytest-timeout."
                keep_timed_out(session, error, test_thread, after=lambda: _report_alone(session))
        finally:
            timeouts.timeout_timer(item, settings)

    def cancel() -> None:
        timer.cancel()
        timer.join()

    timer = threading.Timer(settings.timeout, end)
    timer.name = f"pytest_timeout {item.nodeid}"
    # The function that pytest-timeout itself calls when the test is over.
    vars(item)["cancel_timeout"] = cancel
    timer.start()
    return True


def _report_alone(session: Session) -> None:
    """Write the report of a run whose only process ends; a worker's controller writes it as always."""
    if not hasattr(session.config, "workerinput"):
        for line in _write_report(session):
            session.say(line)


def _make_safe(report: pytest.TestReport) -> None:
    """Neutralise guest text in a report.

    A test may print or compare it, and it could steer a terminal or CI.
    """
    report.sections = [(title, coloured(content)) for title, content in report.sections]
    # In place, because pytest and pytest-xdist print and serialise this structure.
    for trace, crash, _ in getattr(report.longrepr, "chain", ()):
        if crash is not None:
            # The short summary shows only the beginning of this, and the module of an error tells no two failures apart.
            crash.message = coloured(_OUR_MODULES.sub("", crash.message))
        for entry in trace.reprentries:
            arguments, variables = getattr(entry, "reprfuncargs", None), getattr(entry, "reprlocals", None)
            entry.lines[:] = map(coloured, entry.lines)
            if variables is not None:
                variables.lines[:] = map(coloured, variables.lines)
            if arguments is not None:
                arguments.args = [(name, coloured(str(value))) for name, value in arguments.args]


def _fail_for_panics(report: pytest.TestReport, session: Session) -> None:
    """Fail a passed test if a machine's kernel panicked.

    A machine counts in the first test that sees it.
    """
    for machine in session.machines:
        panic = machine.panic if machine.spec.panic == "fail" else None
        if not panic or machine.id in session.reported_panics:
            continue
        # A machine that several tests share must not fail each of them.
        session.reported_panics.add(machine.id)
        if report.passed:
            report.outcome = "failed"
            report.longrepr = (
                f"The test passed, but the kernel of its machine {machine.name!r} was in trouble: {panic}\n"
                'If the test expects that, write panic="expected" in the mark.'
            )
            report.sections.append((f"console of {machine.name}", machine.console.tail(40)))


class InterruptedTest:
    """Hook that keeps the artifacts of the test that an interruption ended, after its machines were ended."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @pytest.hookimpl(trylast=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Keep the artifacts."""
        if self._session.options.artifacts != "never" and (self._session.machines or self._session.ended):
            from pytest_vmbottle.plugin.failures import keep_unreported

            keep_unreported(self._session, "interrupted")


class Outcomes:
    """Hook that marks INFRA outcomes in the process that shows reports.

    That is the only process, or the controller.
    """

    def __init__(self, config: pytest.Config) -> None:
        # `--full-trace` asks for everything, so nothing is shortened then.
        self._infra, self._in_full = config.stash[SESSION].infra, config.option.fulltrace

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test without a machine, before anybody shows or stores its report."""
        self._infra.take(report, in_full=self._in_full)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: Any) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """Return a letter and a word of its own for a test without a machine, among the errors."""
    # The category is one of pytest's own, so that its summary counts the test there.
    return ("error", "I", ("INFRA", {"red": True})) if isinstance(report, pytest.TestReport) and cause_told(report) else None


class Clock:
    """Plugin that notes how long tests take, for the shards of later runs."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase of a test."""
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Store the times of this run over those of earlier ones."""
        cache = getattr(self._config, "cache", None)
        if cache is not None and self._seconds:
            before = cache.get(DURATIONS, {})
            seconds = {nodeid: round(value, 3) for nodeid, value in self._seconds.items()}
            cache.set(DURATIONS, {**(before if isinstance(before, dict) else {}), **seconds})
