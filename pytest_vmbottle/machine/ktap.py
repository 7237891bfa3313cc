"""Results of tests in KTAP, the format of the kernel's own tests (Documentation/dev-tools/ktap.rst): kselftest's and KUnit's.

They come from a guest, among other lines: of the kernel's log, or of the programs that were tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

from pytest_vmbottle.shown import printable

__all__ = ["KernelTest", "parse_ktap"]

# What may stand before a line: the time of the kernel's log, and then, for each level of nesting, blanks (KUnit) or a comment (kselftest).
_BEFORE = re.compile(r"(?:<\d>)?(?:\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?)?")
_LEVEL = re.compile(r"(?:# | {2})*")
_RESULT = re.compile(
    r"(?P<ok>ok|not ok)\b(?: (?P<number>\d+))?(?: -)?(?: (?P<name>.*?))?(?: *# (?P<directive>[A-Z]+)\b(?P<reason>.*)| *# .*)?"
)
_PLAN = re.compile(r"1\.\.(?P<planned>\d+)(?: *# *(?:SKIP|skip)\b.*)?")
_BAIL = re.compile(r"Bail out!(.*)")
_PASSED = ("SKIP", "XFAIL", "TODO")
_LINES, _LONG, _SHOWN = 1_000_000, 1_000, 200
"""Most lines that are read, most characters of each, and most lines of a test's own output that are kept."""


@attrs.frozen(kw_only=True)
class KernelTest:
    """The result of a test, or of tests that belong together.

    Attributes:
        name: Its name, with those of what it belongs to before it: `net/reuseport_bpf/ipv4`.
        ok: Whether it passed, was skipped, or was expected to fail.
        skipped: Why it was skipped; None if it was not.
        output: What it printed before its result, and in its result after the name.
    """

    name: str
    ok: bool
    skipped: str | None = None
    output: str = ""


@attrs.frozen(kw_only=True)
class _Point:
    """A result at its level of nesting, with those that belong to it, and how many of them are missing."""

    level: int
    test: KernelTest
    children: list[_Point] = attrs.field(factory=list)
    planned: int = 0

    @property
    def missing(self) -> int:
        return max(0, self.planned - len(self.children))


def parse_ktap(text: str) -> list[KernelTest]:
    """Return the results in a text, each test once; of tests that belong together those of the parts.

    Tests together are among them if they failed though each part passed, or if parts that were planned are missing.
    """
    # Results that are not known to belong to another one yet: none is deeper than the one after it.
    points: list[_Point] = []
    plans: dict[int, int] = {}
    output: list[str] = []
    for line in text.splitlines()[:_LINES]:
        rest = _BEFORE.sub("", line[:_LONG], count=1)
        said = _LEVEL.sub("", rest, count=1)
        level, said = len(rest) - len(said), said.rstrip()
        if plan := _PLAN.fullmatch(said):
            plans[level] = int(plan["planned"])
        elif (test := _test(said, output)) is not None:
            children = list[_Point]()
            while points and points[-1].level > level:
                children.insert(0, points.pop())
            planned = max((plans.pop(deeper) for deeper in list(plans) if deeper > level), default=0)
            points.append(_Point(level=level, test=test, children=children, planned=planned))
            output = []
        elif said and "TAP version" not in said:
            output = [*output[1 - _SHOWN :], printable(rest.rstrip())]
    whole = KernelTest(name="", ok=True)
    return list(_leaves(_Point(level=-1, test=whole, children=points, planned=max(plans.values(), default=0)), ""))


def _test(said: str, output: list[str]) -> KernelTest | None:
    if bail := _BAIL.fullmatch(said):
        return KernelTest(name="Bail out!", ok=False, output=printable(bail[1].strip()))
    result = _RESULT.fullmatch(said)
    if result is None:
        return None
    directive, reason = result["directive"] or "", printable((result["reason"] or "").strip())
    told = [*output, f"{directive} {reason}".strip()] if directive and directive not in _PASSED else output
    return KernelTest(
        name=printable((result["name"] or "").strip()) or result["number"] or "test",
        ok=result["ok"] == "ok" or directive in _PASSED,
        skipped=reason or "SKIP" if directive == "SKIP" else None,
        output="\n".join(told),
    )


def _leaves(point: _Point, above: str) -> Iterator[KernelTest]:
    name = f"{above}/{point.test.name}".strip("/")
    for child in point.children:
        yield from _leaves(child, name)
    if point.missing:
        lost = f"of {point.planned} tests that were planned, {point.missing} have no result"
        yield attrs.evolve(point.test, name=name or "all tests", ok=False, output=f"{point.test.output}\n{lost}".strip())
    # Of tests that belong together only what their parts do not tell.
    elif point.level >= 0 and (not point.children or (not point.test.ok and all(child.test.ok for child in point.children))):
        yield attrs.evolve(point.test, name=name)
