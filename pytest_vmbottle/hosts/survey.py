"""Survey of what hosts can do, before tests run there."""

from __future__ import annotations

import json
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.hosts.ssh import client, command, refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_vmbottle.spec.host_address import HostAddress

__all__ = ["HostFacts", "survey"]

_ANSWER = 300.0
"""Seconds in which a host answers: the first time, its doctor runs guests."""


@attrs.frozen(kw_only=True)
class HostFacts:
    """Answer of a host.

    Attributes:
        host: Its address.
        version: The version of pytest-vmbottle there; empty if it could not be asked.
        able: Whether machines can be run there.
        accelerator: What QEMU runs guests with.
        memory: Bytes that are free for machines; None if that is unknown.
        packs: Names of the packs in its catalog.
        machines: Names of the machines there that run without pytest.
        problem: Why it is not of use, or an empty text.
    """

    host: str
    version: str = ""
    able: bool = False
    accelerator: str = ""
    memory: int | None = None
    packs: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    problem: str = ""


def survey(address: HostAddress) -> HostFacts:
    """Ask a host what it can do; a host that cannot be asked is a problem, and no error."""
    argv = [*client(address), shlex.join(command(address, "facts"))]
    try:
        ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_ANSWER, check=False)  # noqa: S603 - argv list
    except subprocess.TimeoutExpired:
        return HostFacts(host=str(address), problem=f"{address}: it did not answer within {_ANSWER:.0f} s")
    try:
        told = json.loads(ended.stdout)
    except ValueError:
        error = refusal(address, ended.stdout.decode(errors="replace"), ended.stderr.decode(errors="replace"))
        return HostFacts(host=str(address), problem=str(error))
    return _facts(address, told)


def _facts(address: HostAddress, told: Mapping[str, Any]) -> HostFacts:
    findings = {each["topic"]: each for each in told["findings"]}
    stopping = [each["text"] for each in told["findings"] if each["state"] in ("missing", "unknown")]
    return HostFacts(
        host=str(address),
        version=told["version"],
        able=told["able"],
        accelerator=findings["accelerator"]["details"].get("name", "") if "accelerator" in findings else "",
        memory=findings["memory"]["details"].get("available") if "memory" in findings else None,
        packs=tuple(pack["name"] for pack in told["packs"] or ()),
        machines=tuple(machine["name"] for machine in told["machines"] or () if machine["state"] == "running"),
        problem="" if told["able"] else f"{address}: {'; '.join(stopping) or 'no machine can be run there'}",
    )
