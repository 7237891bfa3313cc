"""What the marks of a test come to: the machines that it is to get."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.spec import Layer, MachineSpec, check_keywords, digest

if TYPE_CHECKING:
    from pytest_vmbottle.spec import Source

__all__ = ["Plan", "named_layer", "parameter", "plans_of"]


@attrs.frozen(eq=False)
class Plan:
    """The machines that one test's marks ask for: the keywords of each by its name. Equal plans are one object."""

    wishes: Mapping[str, Mapping[str, Any]]
    label: str
    key: str

    @property
    def primary(self) -> str:
        """The name of the machine that the fixture `vm` is."""
        return "vm" if "vm" in self.wishes else next(iter(self.wishes))


_PLANS: pytest.StashKey[dict[str, Plan]] = pytest.StashKey()


def plans_of(test: pytest.Item) -> list[Plan]:
    """What a test's marks come to: one plan, or one for each combination of sources that they list.

    Raises:
        SpecError: A mark makes no sense.
    """
    wishes = _merged(test) or {"vm": {}}
    choices = [[(name, source) for source in _sources(test, wish)] for name, wish in wishes.items()]
    plans = []
    for combination in itertools.product(*choices):
        chosen = {name: {**wishes[name], **({} if source is None else {"source": source})} for name, source in combination}
        for wish in chosen.values():
            if "source" in wish:  # checked together, so that a layer's keywords and the mark's are known to fit
                MachineSpec.resolve(wish["source"], {key: value for key, value in wish.items() if key != "source"})
        label = "-".join(_label(source) for _, source in combination)
        plans.append(_plan(test.config, chosen, label))
    return plans


def named_layer(test: pytest.Item, name: str) -> Source:
    """The layer of this name in the test's module or in a conftest above it; else the name is an image's."""
    module = getattr(test, "module", None)
    conftests = [
        plugin
        for plugin in test.config.pluginmanager.get_plugins()
        if Path(str(getattr(plugin, "__file__", None) or "")).name == "conftest.py" and Path(plugin.__file__).parent in test.path.parents
    ]
    conftests.sort(key=lambda plugin: len(Path(plugin.__file__).parts), reverse=True)
    for place in (module, *conftests):
        found = getattr(place, name, None) if name.isidentifier() else None
        if isinstance(found, Layer):
            return found
    return name


def parameter(node: object, name: str) -> object:
    """The parameter that a test got for a fixture, if any."""
    callspec = getattr(node, "callspec", None)
    return None if callspec is None else callspec.params.get(name)


def _merged(test: pytest.Item) -> dict[str, dict[str, Any]]:
    """The keywords of all marks on a test, by the machine's name; of the same keyword the closest mark's."""
    wishes: dict[str, dict[str, Any]] = {}
    for mark in reversed(list(test.iter_markers("vm"))):
        keywords = dict(mark.kwargs)
        if len(mark.args) > 1:
            raise SpecError(f"the vm mark takes one source, not {len(mark.args)}")
        if mark.args and "source" in keywords:
            raise SpecError("the source is given twice: by place and by name")
        if mark.args:
            keywords["source"] = mark.args[0]
        check_keywords({key: value for key, value in keywords.items() if key != "source"})
        wishes.setdefault(keywords.get("name", "vm"), {}).update(keywords)
    return wishes


def _sources(test: pytest.Item, wish: Mapping[str, Any]) -> list[Source | None]:
    source = wish.get("source")
    if source is None:
        return [None]
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise SpecError("source=[]: takes at least one source")
    return [named_layer(test, each) if isinstance(each, str) else each for each in sources]


def _plan(config: pytest.Config, wishes: Mapping[str, Mapping[str, Any]], label: str) -> Plan:
    named = {
        name: {key: repr(sorted(value.items()) if isinstance(value, Mapping) else value) for key, value in wish.items()}
        for name, wish in wishes.items()
    }
    layers = [id(wish.get("source")) for wish in wishes.values() if isinstance(wish.get("source"), Layer)]
    key = digest(named, layers)
    return config.stash.setdefault(_PLANS, {}).setdefault(key, Plan(wishes, label, key))


def _label(source: Source | None) -> str:
    if isinstance(source, Layer):
        return source.name
    return Path(source).stem if isinstance(source, Path) else str(source or "vm")
