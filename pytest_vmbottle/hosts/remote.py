"""The module that execnet runs in a worker on another host: pytest-xdist's own, told the paths of that host.

pytest-xdist takes our gateways for local ones, so it sends the controller's `sys.path`, folder for temporary files and arguments.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["HOST", "adapted"]

HOST = "vmbottle_host"
"""Key of a worker's input: facts of its host, and of the controller."""


def adapted(arguments: Iterable[str], facts: Mapping[str, str]) -> list[str]:
    """Return arguments for pytest with the host's paths instead of the controller's.

    >>> facts = {"root": "/home/ann/it", "project": "/tmp/x/it", "catalog": "/var/c", "output": "/tmp/x/a"}
    >>> adapted(["/home/ann/it/tests", "--junitxml=/home/ann/it/out.xml", "-x"], facts)[1:4]
    ['/tmp/x/it/tests', '--junitxml=/tmp/x/it/out.xml', '-x']

    Args:
        arguments: Those of the controller.
        facts: `root`, the project's root folder there, and what there is on this host: `project`, `catalog` and `output`.
    """
    words = [_moved(word, facts) for word in arguments]
    ours = [f"--vm-catalog={facts['catalog']}", f"--vm-output={facts['output']}"]
    # The last one of an option counts; behind two hyphens there are no options.
    end = words.index("--") if "--" in words else len(words)
    return [f"--rootdir={facts['project']}", *words[:end], *ours, *words[end:]]


def _moved(word: str, facts: Mapping[str, str]) -> str:
    before, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    path, colons, rest = value.partition("::")
    if not Path(path).is_absolute() or not Path(path).is_relative_to(facts["root"]):
        return word
    return f"{before}{equals}{Path(facts['project'], Path(path).relative_to(facts['root']))}{colons}{rest}"


class _Channel:
    """Channel to the controller whose first message is adapted."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def receive(self) -> tuple[dict[str, Any], list[str], dict[str, Any], None]:
        inputs, arguments, _, _ = self._channel.receive()
        facts = inputs[HOST]
        facts |= {"catalog": os.environ["VMBOTTLE_CATALOG"], "output": os.environ["VMBOTTLE_OUTPUT"]}
        # No folder for temporary files: pytest makes one for each worker. No `sys.path`: pytest-xdist adds the current folder then.
        return inputs, adapted(arguments, facts), {}, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


if __name__ == "__channelexec__":
    # By its path: pytest would warn of plugins that are imported before it could rewrite their assertions. So nothing of ours is, either.
    found = importlib.util.find_spec("xdist")
    source = Path(str(found.origin if found else "")).with_name("remote.py")
    runpy.run_path(str(source), {"channel": _Channel(channel)}, "__channelexec__")  # type: ignore[name-defined] # noqa: F821
