"""Checks of smolvm: its program, and a machine that runs."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from pytest_vmbottle.backends.smolvm.program import Program
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host.checks import kvm_remedy
from pytest_vmbottle.host.findings import Answer, Check, missing, ok

__all__ = ["ProbeResult", "SmolvmChecks"]


@attrs.frozen(kw_only=True)
class ProbeResult:
    """Outcome of running a machine here.

    Attributes:
        works: Whether a command ran in a guest.
        evidence: One sentence about what happened.
        seconds: Seconds that it took.
    """

    works: bool
    evidence: str
    seconds: float


@attrs.frozen(kw_only=True)
class SmolvmChecks:
    """The checks of one smolvm.

    Attributes:
        find: Function that returns the program, or raises `BackendUnavailable` if there is none.
        prove: Function that runs a machine now, or raises the same.
        chosen: Whether machines are run with it; otherwise it need not be there.
    """

    find: Callable[[], Program]
    prove: Callable[[], ProbeResult]
    chosen: bool

    def all(self) -> tuple[Check, ...]:
        """Return the checks in the order to run them."""
        return Check("smolvm", self._program, needed=self.chosen), Check("smolvm machines", self._machines, needed=self.chosen)

    def _program(self) -> Answer:
        try:
            found = self.find()
        except BackendUnavailable as error:
            if self.chosen:
                return missing(error.reason, error.remedy)
            return ok(f"not used: {error.reason}", remedy=error.remedy)
        return ok(f"smolvm {found.version}, {found.path}", path=str(found.path), version=found.version, verbs=sorted(found.verbs))

    def _machines(self) -> Answer:
        try:
            verdict = self.prove()
        except BackendUnavailable:
            # The check before this one has reported that already.
            return ok("not checked, because there is no smolvm")
        details = {"evidence": verdict.evidence, "seconds": round(verdict.seconds, 1)}
        if verdict.works:
            return ok(f"smolvm runs machines: {verdict.evidence}, after {verdict.seconds:.1f} s", **details)
        # The evidence names the device only where it is missing or closed; for other failures there is no command that helps.
        remedy = kvm_remedy() if "/dev/kvm" in verdict.evidence else ""
        return missing(f"smolvm runs no machine here: {verdict.evidence}", remedy, **details)
