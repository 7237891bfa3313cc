"""Collection of tests with machines: parameters, order, and refusal of wrong marks before anything runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmbottle.errors import SpecError, VMBottleError
from pytest_vmbottle.plugin.plans import FACTORIES, SHARED, Plan, given_plan, named_layer, parameter, plan_of, plans_of
from pytest_vmbottle.plugin.session import SESSION, Session
from pytest_vmbottle.spec import SIGNATURE, MachineSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Sorting", "resolve", "specs_of", "uses_machine"]

_RESET = "_vm_reset"
_MACHINES = frozenset({*SHARED, "vm", "vms", "vm_spec", "_vm_plan"})
"""Fixtures whose machines the marks describe."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test with its plan; only a list of sources shows in the node id.

    A matrix parametrizes one fixture only, because a second one would multiply the tests again.
    """
    names = [name for name in (*SHARED, "_vm_plan") if name in metafunc.fixturenames]
    if not names:
        return
    try:
        plans = plans_of(metafunc.definition)
    except SpecError:
        return  # told in pytest_collection_modifyitems, for all tests together
    # One plan is hidden, so that a test has the same node id with the mark and without.
    single = len(plans) == 1
    ids = [pytest.HIDDEN_PARAM if single else plan.label for plan in plans]
    # A single plan for all of them, because each shared fixture finds its own by its parameter.
    for name in names if single else names[:1]:
        metafunc.parametrize(name, plans, indirect=True, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse all wrong marks at once, before anything runs."""
    for item in items:
        _plan_reset(item)
    _settle(config, items)


def _settle(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set each test's plan from its marks, or refuse all wrong marks at once."""
    session = config.stash[SESSION]
    for item in items:
        try:
            _settle_one(item)
        except SpecError as error:
            # The signature comes once, whether the error has it already or not.
            told = str(error) if SIGNATURE in str(error) else f"{error}\n  the signature is {SIGNATURE}"
            session.problems.update(dict.fromkeys(("wrong vm marks:", f"{item.nodeid}: {told}")))
    # All mistakes together, so that they can be mended in one go.
    if session.problems:
        _refuse(config, items)


def _settle_one(item: pytest.Item) -> None:
    asked = {*SHARED, "_vm_plan"} & set(getattr(item, "fixturenames", ()))
    if not asked:
        plans_of(item)  # for what may be wrong with a mark, which is wrong also where it is of no use
        return
    plan = plan_of(item)
    for name in (*SHARED, "_vm_plan"):
        if isinstance(parameter(item, name), Plan):
            # Replaced, because marks of a parameter set and of hooks came after pytest had made the parameters.
            item.callspec.params[name] = plan  # type: ignore[attr-defined] # it has one
        elif name in asked and name != "_vm_plan":
            _check_shared(item, name, plan)


def _check_shared(item: pytest.Item, name: str, plan: Plan) -> None:
    """Refuse a shared machine for a test without parameters, unless its marks are those of its class.

    Tests of unittest have no parameters.
    """
    if given_plan(item) is not None:
        raise SpecError(f"a list of sources works with one shared machine, and {name} is a second one: request only one of them")
    # Tests of unittest have no parameters, and only a class has marks that all of its tests share.
    if name != "class_vm":
        raise SpecError(f"{name} does not work in a unittest.TestCase: use class_vm there, with the mark on the class")
    shared_by = item.getparent(pytest.Class) or item
    if plan not in plans_of(shared_by):
        raise SpecError("in a unittest.TestCase, only the marks on the class describe class_vm: put this mark on the class")


def _refuse(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        raise config.stash[SESSION].usage_error() from None
    items.clear()  # xdist takes a usage error in a worker for a crash: its controller raises it, see reports.pytest_sessionfinish


def _plan_reset(item: pytest.Item) -> None:
    """Make a test reset its shared machine, if need be, as soon as it has the machine."""
    names: list[str] = getattr(item, "fixturenames", [])
    shared = [index for index, name in enumerate(names) if name in SHARED]
    if shared and _RESET not in names:
        # Behind the shared fixtures, because pytest sets fixtures up in this order.
        names.insert(shared[-1] + 1, _RESET)


class Sorting:
    """Hook that puts tests of the same session machine next to each other.

    It runs after all other plugins have changed the order.
    """

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
        """Sort the tests that use `session_vm`, stably, among their places.

        All other tests stay at their places. Marks that other plugins have added by now count too.
        """
        # First all other plugins: pytest-randomly and its like shuffle the items in this hook.
        yield
        _settle(config, items)
        places = [index for index, item in enumerate(items) if "session_vm" in getattr(item, "fixturenames", ())]
        first: dict[str, int] = {}
        for index in places:
            # At the place of the first of them, so that the order of other tests stays as it is.
            first.setdefault(_session_key(items[index]), index)
        ordered = sorted((items[index] for index in places), key=lambda item: first[_session_key(item)])
        for index, item in zip(places, ordered, strict=True):
            items[index] = item
        _prepare(config, items)


def _session_key(item: pytest.Item) -> str:
    plan = parameter(item, "session_vm")
    return plan.key if isinstance(plan, Plan) else ""


def _prepare(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Prepare what tests with machines need.

    Only now the final tests are known: if none of them has a machine, the host is not probed.
    """
    session = config.stash[SESSION]
    # Items that are deselected are gone from the list by now, so they install no signal handler and probe nothing.
    session.has_machines = not session.only_asked and any(uses_machine(item) for item in items)
    if not session.has_machines:
        return
    try:
        # Read here for its error: a wrong declaration is told before any test runs.
        _ = session.declared
    except SpecError as error:
        session.has_machines = False
        session.problems[str(error)] = None
        _refuse(config, items)
    # Only now, so that a run without machines keeps the process's signal handlers.
    session.interruption.install()
    _tell_controller(config)
    session.unable = _leave_out_what_cannot_be(session, items)


def uses_machine(item: pytest.Item) -> bool:
    """Tell whether a test has a machine, or may ask for one."""
    return item.get_closest_marker("vm") is not None or bool({*_MACHINES, *FACTORIES} & set(getattr(item, "fixturenames", ())))


def _tell_controller(config: pytest.Config) -> None:
    """Tell the controller that there are tests with machines."""
    # A controller of pytest-xdist collects no items itself, so it learns from its workers whether there are machines.
    hosted = config.stash[SESSION].hosted
    if hosted is not None:
        hosted.flag()
    flag = getattr(config, "workerinput", {}).get("vmbottle_flag")
    if flag is not None:
        with suppress(OSError):
            Path(flag).write_text("machines")


def _leave_out_what_cannot_be(session: Session, items: list[pytest.Item]) -> dict[str, int]:
    """Skip the tests whose machine the backend cannot make on any host, or let them fail.

    Return the number of tests by reason.
    """
    unable: dict[str, int] = {}
    known: dict[Plan, str | None] = {}
    for item in items:
        plan = given_plan(item) if item.get_closest_marker("vm") is not None else None
        if plan is None:
            continue
        if plan not in known:
            known[plan] = _refusal(session, plan)
        why = known[plan]
        if why is not None:
            unable[why] = unable.get(why, 0) + 1
            # Else it fails in its setup, by the same reason.
            if session.options.skips_missing:
                item.add_marker(pytest.mark.skip(reason=why))
    return unable


def _refusal(session: Session, plan: Plan) -> str | None:
    """Return why the backend cannot make the machines that a test's marks describe, or None."""
    for wish in plan.wishes.values():
        # Defaults of a fixture are not known yet, so a test is left out only for what its marks and the ini file say.
        keywords = {"source": "", **session.options.defaults, **wish}
        session.wanted.add(session.options.backend_for(keywords.get("backend", "auto")))
        source = keywords.pop("source") or session.placeholder
        # Whatever else is wrong here is told when the test runs: then defaults and hooks are known.
        with suppress(VMBottleError, pytest.UsageError):
            spec = MachineSpec.resolve(source, keywords)
            why = session.unsupported_reason(spec)
            if why is not None:
                return why
    return None


def resolve(config: pytest.Config, wish: Mapping[str, Any], defaults: Mapping[str, Any], item: pytest.Item | None) -> MachineSpec:
    """Return the spec of a machine that a test's marks, a factory's call or the ini file describe.

    Args:
        config: The run.
        wish: Keywords of the mark.
        defaults: Keywords that hold where the mark and its layer say nothing.
        item: The test, in whose modules layers are looked for by name; None for a machine that several tests share.

    Raises:
        SpecError: The keywords are wrong.
    """
    keywords = dict(wish)
    backend = keywords.get("backend", defaults.get("backend", "auto"))
    if "source" not in keywords:
        # A backend may have an image of its own, so that a mark without a source is complete there.
        keywords["source"] = defaults.get("source") or config.stash[SESSION].default_source(backend)
    if keywords["source"] is None:
        raise SpecError('no machine is described: mark the test with @pytest.mark.vm("debian-12"), or set vm_defaults = source = debian-12')
    # Before the keywords are checked, so that the hook's are checked as well.
    changed = config.hook.pytest_vmbottle_spec(item=item, keywords=keywords)
    keywords = dict(changed if changed is not None else keywords)
    source = keywords.pop("source")
    if isinstance(source, str) and item is not None:
        source = named_layer(item, source)
    return MachineSpec.resolve(source, keywords, defaults={key: value for key, value in defaults.items() if key != "source"})


def specs_of(item: pytest.Item) -> list[MachineSpec]:
    """Return the specs of a test's machines; those that it makes by a factory are not known before it runs.

    Raises:
        SpecError: The keywords are wrong.
    """
    if not _MACHINES & set(getattr(item, "fixturenames", ())):
        return []
    defaults = item.config.stash[SESSION].options.defaults
    return [resolve(item.config, wish, defaults, item) for wish in plan_of(item).wishes.values()]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Report the backends that the machines run on, if there are any machines."""
    session = config.stash[SESSION]
    if not session.has_machines:
        return []
    session.told.update(session.describe_hosts())
    outcome = "skipped" if session.options.skips_missing else "failed"
    unable = [f"vmbottle: {count} {'test' if count == 1 else 'tests'} {outcome}: {why}" for why, count in session.unable.items()]
    return [*session.told, *unable]
