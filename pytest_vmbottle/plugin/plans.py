"""Plans: the machines that the marks of a test ask for."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.spec import Layer, MachineSpec, mistakes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.spec import Source

__all__ = ["FACTORIES", "SHARED", "Plan", "given_plan", "named_layer", "near_layers", "parameter", "plan_of", "plans_of"]


@attrs.frozen
class Plan:
    """Machines that one test's marks ask for: keywords by name.

    Plans of the same machines are equal.
    """

    key: str
    wishes: Mapping[str, Mapping[str, Any]] = attrs.field(eq=False)
    label: str = attrs.field(eq=False)
    sources: tuple[Source | None, ...] = attrs.field(eq=False)
    alone: bool = attrs.field(eq=False)
    """True for a single plan of a test's marks, false for one of a matrix."""

    @property
    def primary(self) -> str:
        """The name of the machine that the fixture `vm` returns."""
        return "vm" if "vm" in self.wishes else next(iter(self.wishes))


_KNOWN: pytest.StashKey[dict[tuple[object, ...], tuple[list[pytest.Mark], list[Plan]]]] = pytest.StashKey()
_SOUND: pytest.StashKey[set[str]] = pytest.StashKey()
"""Marks as texts, and keys of plans, with which nothing is wrong: many tests have the same, and a check takes long."""

SHARED = ("session_vm", "module_vm", "class_vm")
FACTORIES = ("session_vm_factory", "module_vm_factory", "class_vm_factory", "vm_factory")
"""Fixtures of machines that several tests share."""


def plans_of(node: pytest.Item | pytest.Collector) -> list[Plan]:
    """Return the plans of a test, class or module: one, or one for each combination of listed sources.

    Raises:
        SpecError: A mark is invalid.
    """
    # Farthest first, so that the keywords of nearer marks overwrite those of farther ones.
    marks = [*_nearest_first(node)][::-1]
    # Asked several times of each test. The marks are kept with the answer, so that no other mark gets the id of one.
    known = node.config.stash.setdefault(_KNOWN, {})
    key = (node.path, *map(id, marks))
    if key not in known:
        known[key] = marks, _plans(node, marks)
    return known[key][1]


def _plans(node: pytest.Item | pytest.Collector, marks: list[pytest.Mark]) -> list[Plan]:
    sound = node.config.stash.setdefault(_SOUND, set())
    # A test without a mark may have its machine from the ini file's defaults.
    wishes = _merged(marks, sound) or {"vm": {}}
    choices = [_sources(node, wish) for wish in wishes.values()]
    combinations = list(itertools.product(*choices))
    plans = [_plan(wishes, combination, alone=len(combinations) == 1) for combination in combinations]
    for plan in plans:
        if plan.key not in sound:
            _check(plan)
            sound.add(plan.key)
    return plans


def _check(plan: Plan) -> None:
    """Refuse keywords of a mark and of its layer that are right each and wrong together."""
    for wish in plan.wishes.values():
        if "source" in wish:
            MachineSpec.resolve(wish["source"], {key: value for key, value in wish.items() if key != "source"})


def plan_of(test: pytest.Item) -> Plan:
    """Return the plan that a test runs with: its parameter's, with all marks that it has now.

    Marks of a parameter set, and those that hooks add, are set after pytest has fixed the parameters.

    Raises:
        SpecError: A mark is invalid, or lists sources where pytest can no longer make a test for each.
    """
    # Two answers: of the marks as they are now, and of those that pytest made the parameters from.
    plans, given = plans_of(test), given_plan(test)
    if given is None and len(plans) > 1:
        raise SpecError(
            f"a list of sources cannot be a matrix here ({', '.join(plan.label for plan in plans)}): make the fixture an argument of the "
            'test, or write @pytest.mark.usefixtures("vm"); in a unittest.TestCase write one source, and a class for each'
        )
    if given is None or (given.alone and plans[0].alone):
        return plans[0]
    # By the sources, which are all that a matrix chooses among.
    same = [plan for plan in plans if plan.sources == given.sources]
    if given.alone or not same:
        raise SpecError(
            "a parameter set or a hook changes the list of sources when the tests already exist: write the list in the mark on "
            "the function, the class or the module, and at most one source in a parameter set or a hook"
        )
    return same[0]


def given_plan(test: pytest.Item) -> Plan | None:
    """Return the plan that a test has as a parameter, if any."""
    given = (parameter(test, name) for name in (*SHARED, "_vm_plan"))
    return next((plan for plan in given if isinstance(plan, Plan)), None)


def named_layer(node: pytest.Item | pytest.Collector, name: str) -> Source:
    """Return the layer of this name in the test's module or in a conftest above it.

    Without such a layer, the name is an image's, and is returned.
    """
    # Names of images mostly have a dash, so no module is searched for them.
    found = (getattr(place, name, None) for place in _places(node)) if name.isidentifier() else ()
    return next((each for each in found if isinstance(each, Layer)), name)


def near_layers(node: pytest.Item | pytest.Collector, name: str) -> list[str]:
    """Return the names of layers that a test could have meant by a name, nearest first."""
    there = {each for place in _places(node) for each, value in vars(place).items() if isinstance(value, Layer)}
    return difflib.get_close_matches(name, sorted(there), n=3)


def _places(node: pytest.Item | pytest.Collector) -> list[object]:
    """Return the test's module and the conftests above it, nearest first."""
    conftests = [
        plugin
        for plugin in node.config.pluginmanager.get_plugins()
        # By the text first: there are many plugins, and this is asked for each mark.
        if str(getattr(plugin, "__file__", "")).endswith("/conftest.py") and Path(plugin.__file__).parent in node.path.parents
    ]
    # The longest path is the nearest folder, as all of them are above the same test.
    conftests.sort(key=lambda plugin: len(Path(plugin.__file__).parts), reverse=True)
    module = getattr(node, "module", None)
    return [*([module] if module is not None else []), *conftests]


def parameter(node: object, name: str) -> object:
    """Return the parameter that a test got for a fixture, if any."""
    callspec = getattr(node, "callspec", None)
    return None if callspec is None else callspec.params.get(name)


def _merged(marks: list[pytest.Mark], sound: set[str]) -> dict[str, dict[str, Any]]:
    """Merge the keywords of all marks on a test, farthest first, by the machine's name.

    The nearest mark's value of a keyword wins.
    """
    texts = {repr((mark.args, mark.kwargs)): mark for mark in marks}
    # As keys of a dictionary: each mistake once, in the order of the marks.
    wrong = dict.fromkeys(mistake for text, mark in texts.items() if text not in sound for mistake in _mistakes(mark))
    if wrong:
        raise SpecError("\n  ".join(wrong))
    sound.update(texts)
    wishes: dict[str, dict[str, Any]] = {}
    for mark in marks:
        keywords = {**({"source": mark.args[0]} if mark.args else {}), **mark.kwargs}
        wishes.setdefault(keywords.get("name", "vm"), {}).update(keywords)
    return wishes


def _nearest_first(node: pytest.Item | pytest.Collector) -> Iterator[pytest.Mark]:
    """Yield the marks of a test, nearest first.

    Those of its parameter set come first, then those of its function, of its classes in the order of attribute lookup, and of its module.

    A mark that a hook has added is the farthest of those of its test, or the nearest, as the hook chose.
    """
    # `iter_markers` of pytest would do, but it gives the marks of base classes in the reverse of the order of attribute lookup.
    for each in reversed(node.listchain()):
        marks = [mark for mark in each.own_markers if mark.name == "vm"]
        if len(marks) > 1:
            depths = _depths(each)
            marks.sort(key=lambda mark: depths.get(id(mark), 0))
        yield from marks


def _depths(node: object) -> dict[int, int]:
    """Return the distance from a test of marks whose order pytest has reversed, by their ids; 0 for all others."""
    callspec = getattr(node, "callspec", None)
    if callspec is not None:
        return dict.fromkeys(map(id, callspec.marks), -1)
    bases: tuple[type, ...] = node.obj.__mro__ if isinstance(node, pytest.Class) else ()
    return {id(mark): depth for depth, base in reversed([*enumerate(bases)]) for mark in _marks_on(base)}


def _marks_on(kind: type) -> list[object]:
    # Not by `getattr`, which would find those of a base class again.
    marks = kind.__dict__.get("pytestmark", ())
    return [getattr(mark, "mark", mark) for mark in (marks if isinstance(marks, list | tuple) else (marks,))]


def _mistakes(mark: pytest.Mark) -> list[str]:
    """Return all mistakes of a single mark."""
    keywords = {key: value for key, value in mark.kwargs.items() if key != "source"}
    sources = [*mark.args, *([mark.kwargs["source"]] if "source" in mark.kwargs else [])]
    wrong = []
    # All of a mark's mistakes are told, not only the first.
    if len(mark.args) > 1:
        wrong.append(f"the vm mark takes one source, not {len(mark.args)}")
    elif len(sources) > 1:
        wrong.append("the source is given twice: by position and by name")
    else:
        listed = [each for source in sources for each in (source if isinstance(source, list | tuple) else [source])]
        if sources and not listed:
            wrong.append("source=[]: takes at least one source")
        wrong += [mistake for source in listed for mistake in mistakes({"source": source})]
    return [*wrong, *mistakes(keywords)]


def _sources(node: pytest.Item | pytest.Collector, wish: Mapping[str, Any]) -> list[Source | None]:
    source = wish.get("source")
    if source is None:
        return [None]
    sources = source if isinstance(source, list | tuple) else [source]
    return [named_layer(node, each) if isinstance(each, str) else each for each in sources]


def _plan(wishes: Mapping[str, Mapping[str, Any]], sources: tuple[Source | None, ...], *, alone: bool) -> Plan:
    """Make the plan of one choice among the sources."""
    given = [{} if source is None else {"source": source} for source in sources]
    chosen = {name: {**wish, **source} for (name, wish), source in zip(wishes.items(), given, strict=True)}
    # By `repr` and sorted, because keywords need not be hashable, and equal marks must give equal plans.
    named = {
        name: {key: repr(sorted(value.items()) if isinstance(value, Mapping) else value) for key, value in wish.items()}
        for name, wish in chosen.items()
    }
    # By identity: two layers of the same name in two modules are not the same layer.
    layers = [id(source) for source in sources if isinstance(source, Layer)]
    return Plan(digest(named, layers), chosen, "-".join(map(_label, sources)), sources, alone)


def _label(source: Source | None) -> str:
    if isinstance(source, Layer):
        return source.name
    return Path(source).stem if isinstance(source, Path) else str(source or "vm")
