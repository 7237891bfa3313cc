"""A process that starts one machine for the service.

A start takes as long as a boot, or as the build of an image, and must be cancelled when the service ends. Only a process of its own can be:
a signal unwinds it wherever it is, and nothing is left of the machine. The machine's daemon goes on when it ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.host.signals import Interruption, left
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.orders import new_order

__all__ = ["main"]


def main() -> int:
    """Start the machine that the standard input describes; tell what happens on the standard output, and return the exit status.

    The input is a JSON object: `new` has the arguments of `new_order`, or `again` those of `Kept.start_again`, with the machine's `folder`.
    The output has one JSON object per line: `say`, a line about long work, or at the end `error` and `message`.
    """
    request = json.loads(sys.stdin.buffer.read())
    try:
        with Interruption(left, owned=True):
            _start(request)
    except (VMBottleError, OSError) as error:
        _tell(error=type(error).__name__, message=str(error))
        return 1
    return 0


def _start(request: Mapping[str, Any]) -> None:
    def say(words: str) -> None:
        _tell(say=words)

    if "again" in request:
        Kept(Path(request["folder"])).start_again(say, **request["again"])
        return
    given = request["new"]
    # Made again of its parts, since a snapshot in it has no form in JSON.
    order = new_order(**{**given, **{name: Path(given[name]) for name in ("machines", "catalog", "folder")}})
    order.place.start(order.facts, say, snapshot=order.snapshot)


def _tell(**message: str) -> None:
    print(json.dumps(message), flush=True)  # noqa: T201 - the service reads it


if __name__ == "__main__":
    sys.exit(main())
