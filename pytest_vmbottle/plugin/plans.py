"""What the marks of a test come to: the machines that it is to get."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.spec import Layer, MachineSpec, digest, mistakes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.spec import Source

__all__ = ["SHARED", "Plan", "given_plan", "named_layer", "near_layers", "parameter", "plan_of", "plans_of"]


@attrs.frozen
class Plan:
    """The machines that one test's marks ask for: the keywords of each by its name. Plans of the same machines are equal."""

    key: str
    wishes: Mapping[str, Mapping[str, Any]] = attrs.field(eq=False)
    label: str = attrs.field(eq=False)
    sources: tuple[Source | None, ...] = attrs.field(eq=False)
    alone: bool = attrs.field(eq=False)
    """Whether it is all that the marks come to, rather than one of a matrix."""

    @property
    def primary(self) -> str:
        """The name of the machine that the fixture `vm` is."""
        return "vm" if "vm" in self.wishes else next(iter(self.wishes))


SHARED = ("session_vm", "module_vm", "class_vm")
"""The fixtures of machines that several tests use."""


def plans_of(node: pytest.Item | pytest.Collector) -> list[Plan]:
    """What the marks of a test, or of a class or module, come to: one plan, or one for each combination of sources that they list.

    Raises:
        SpecError: A mark makes no sense.
    """
    wishes = _merged(node) or {"vm": {}}
    choices = [_sources(node, wish) for wish in wishes.values()]
    combinations = list(itertools.product(*choices))
    return [_plan(wishes, combination, alone=len(combinations) == 1) for combination in combinations]


def plan_of(test: pytest.Item) -> Plan:
    """The plan that a test runs with: that of its parameter, with all that its marks say by now.

    Marks of a parameter set, and those that hooks add, come after pytest was told which parameters there are.

    Raises:
        SpecError: A mark makes no sense, or lists sources where there can be no test for each.
    """
    plans, given = plans_of(test), given_plan(test)
    if given is None and len(plans) > 1:
        raise SpecError(
            f"a list of sources makes no matrix here ({', '.join(plan.label for plan in plans)}): have the test name its fixture among its "
            'arguments or in @pytest.mark.usefixtures("vm"); in a unittest.TestCase write one source, and a class for each'
        )
    if given is None or (given.alone and plans[0].alone):
        return plans[0]
    same = [plan for plan in plans if plan.sources == given.sources]
    if given.alone or not same:
        raise SpecError(
            "a parameter set, or a hook, changes what sources the mark lists, when the tests are made already: list them in the mark on "
            "the function, the class or the module, and one at most in a parameter set or a hook"
        )
    return same[0]


def given_plan(test: pytest.Item) -> Plan | None:
    """The plan that a test has as a parameter, if any."""
    given = (parameter(test, name) for name in (*SHARED, "_vm_plan"))
    return next((plan for plan in given if isinstance(plan, Plan)), None)


def named_layer(node: pytest.Item | pytest.Collector, name: str) -> Source:
    """The layer of this name in the test's module or in a conftest above it; else the name is an image's."""
    found = (getattr(place, name, None) for place in _places(node)) if name.isidentifier() else ()
    return next((each for each in found if isinstance(each, Layer)), name)


def near_layers(node: pytest.Item | pytest.Collector, name: str) -> list[str]:
    """The names, nearest first, of layers that a test could have meant by a name."""
    there = {each for place in _places(node) for each, value in vars(place).items() if isinstance(value, Layer)}
    return difflib.get_close_matches(name, sorted(there), n=3)


def _places(node: pytest.Item | pytest.Collector) -> list[object]:
    """The test's module, and the conftests above it, the closest first."""
    conftests = [
        plugin
        for plugin in node.config.pluginmanager.get_plugins()
        if Path(str(getattr(plugin, "__file__", None) or "")).name == "conftest.py" and Path(plugin.__file__).parent in node.path.parents
    ]
    conftests.sort(key=lambda plugin: len(Path(plugin.__file__).parts), reverse=True)
    module = getattr(node, "module", None)
    return [*([module] if module is not None else []), *conftests]


def parameter(node: object, name: str) -> object:
    """The parameter that a test got for a fixture, if any."""
    callspec = getattr(node, "callspec", None)
    return None if callspec is None else callspec.params.get(name)


def _merged(node: pytest.Item | pytest.Collector) -> dict[str, dict[str, Any]]:
    """The keywords of all marks on a test, by the machine's name; of the same keyword the nearest mark's."""
    marks = [*_nearest_first(node)][::-1]
    wrong = dict.fromkeys(mistake for mark in marks for mistake in _mistakes(mark))
    if wrong:
        raise SpecError("\n  ".join(wrong))
    wishes: dict[str, dict[str, Any]] = {}
    for mark in marks:
        keywords = {**({"source": mark.args[0]} if mark.args else {}), **mark.kwargs}
        wishes.setdefault(keywords.get("name", "vm"), {}).update(keywords)
    return wishes


def _nearest_first(node: pytest.Item | pytest.Collector) -> Iterator[pytest.Mark]:
    """The marks of a test's parameter set, of its function, of its classes in the order in which Python looks attributes up, of its module.

    One that a hook has added counts as the farthest of those of its test, or as the nearest, as the hook said.
    """
    for each in reversed(node.listchain()):
        depths = _depths(each)
        yield from sorted((mark for mark in each.own_markers if mark.name == "vm"), key=lambda mark: depths.get(id(mark), 0))


def _depths(node: object) -> dict[int, int]:
    """How far away from a test marks of its own node are, by their ids, where pytest has them the other way round; 0 for all others."""
    callspec = getattr(node, "callspec", None)
    if callspec is not None:
        return dict.fromkeys(map(id, callspec.marks), -1)
    bases: tuple[type, ...] = node.obj.__mro__ if isinstance(node, pytest.Class) else ()
    return {id(mark): depth for depth, base in reversed([*enumerate(bases)]) for mark in _marks_on(base)}


def _marks_on(kind: type) -> list[object]:
    marks = kind.__dict__.get("pytestmark", ())
    return [getattr(mark, "mark", mark) for mark in (marks if isinstance(marks, list | tuple) else (marks,))]


def _mistakes(mark: pytest.Mark) -> list[str]:
    """All that is wrong with a mark by itself."""
    keywords = {key: value for key, value in mark.kwargs.items() if key != "source"}
    sources = [*mark.args, *([mark.kwargs["source"]] if "source" in mark.kwargs else [])]
    wrong = []
    if len(mark.args) > 1:
        wrong.append(f"the vm mark takes one source, not {len(mark.args)}")
    elif len(sources) > 1:
        wrong.append("the source is given twice: by place and by name")
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
    """The plan of one choice among the sources, of which it is known that a layer's keywords and the mark's fit together."""
    given = [{} if source is None else {"source": source} for source in sources]
    chosen = {name: {**wish, **source} for (name, wish), source in zip(wishes.items(), given, strict=True)}
    for wish in chosen.values():
        if "source" in wish:
            MachineSpec.resolve(wish["source"], {key: value for key, value in wish.items() if key != "source"})
    named = {
        name: {key: repr(sorted(value.items()) if isinstance(value, Mapping) else value) for key, value in wish.items()}
        for name, wish in chosen.items()
    }
    layers = [id(source) for source in sources if isinstance(source, Layer)]
    return Plan(digest(named, layers), chosen, "-".join(map(_label, sources)), sources, alone)


def _label(source: Source | None) -> str:
    if isinstance(source, Layer):
        return source.name
    return Path(source).stem if isinstance(source, Path) else str(source or "vm")
