"""A program on a host that tells what there is, as JSON: what `vmbottle doctor`, `pack ls` and `machine ls` say there."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

__all__ = ["main"]

_COMMANDS = {"findings": ("doctor",), "packs": ("pack", "ls"), "machines": ("machine", "ls")}


def main() -> None:
    """Write the facts to stdout."""
    # Processes, because this package may not import the commands: they are above it.
    running = {name: _started(*words) for name, words in _COMMANDS.items()}
    # Read one after the other: what an output has beyond a pipe's size waits meanwhile.
    outputs = {name: process.communicate()[0] for name, process in running.items()}
    facts = {name: json.loads(output or "null") for name, output in outputs.items()}
    version = importlib.metadata.version("pytest-vmbottle")
    sys.stdout.write(json.dumps({"version": version, "able": running["findings"].returncode == 0, **facts}) + "\n")


def _started(*words: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-P", "-m", "pytest_vmbottle", *words, "--json"]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)  # noqa: S603 - argv list, no shell


if __name__ == "__main__":
    main()
