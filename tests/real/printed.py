"""Pages of the documentation that a reader follows from the top: their files are written, and their commands run, as they are printed."""

from __future__ import annotations

import doctest
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs

_BLOCK = re.compile(
    r"^(?:<!-- status (?P<status>\d+) -->\n)?```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
"""A block of code, maybe with the name of its file, or with the status that its commands have."""
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_SECONDS = 900


@attrs.frozen
class Reader:
    """Somebody who follows pages in a folder of their own.

    Attributes:
        folder: The folder, in which files are written and commands run.
        env: The environment of the commands.
    """

    folder: Path
    env: Mapping[str, str]

    def follow(self, page: str) -> int:
        """Does all that a page says, in its order, and returns how many commands that were."""
        commands = 0
        for block in _BLOCK.finditer(page):
            if block["title"]:
                self._write(block["title"], block["text"])
            elif block["kind"] == "console":
                for command in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
                    self._run(command, int(block["status"] or 0))
                    commands += 1
        return commands

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _run(self, command: str, status: int) -> None:
        line, _, told = command.partition("\n")
        ended = subprocess.run(
            shlex.split(line),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        # For whoever reads why a page is wrong.
        sys.stdout.write(f"$ {line}\n{ended.stdout}\n")
        assert ended.returncode == status, f"{line}: status {ended.returncode}\n{ended.stdout}"
        # Before the first line that is shown and after the last one there may be others.
        shown = f"...{_plain(told).strip()}..." if told.strip() else ""
        seen = doctest.OutputChecker().check_output(shown, _plain(ended.stdout), _FLAGS)
        assert not shown or seen, f"{line} printed\n{ended.stdout}\nand not\n{told}"


def _plain(text: str) -> str:
    """The part that is the same each time: without seconds, and without the lines whose length depends on them."""
    return re.sub(r"[=-]{3,}", "===", re.sub(r"\d+\.\d+ ?s\b( \(\d+:\d\d:\d\d\))?", "1 s", text))
