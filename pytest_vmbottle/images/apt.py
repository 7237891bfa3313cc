"""Where this host gets its packages from, so that what is built here comes from the same place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["apt_sources", "keyrings"]

_ONE_LINE = re.compile(r"deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?:\s|$)")
_SIGNED_BY = re.compile(r"signed-by\s*[:=]\s*(/[^\s\],]+)", re.IGNORECASE)


def apt_sources(suite: str, apt: Path = Path("/etc/apt")) -> dict[str, str]:
    """This host's own package sources for a suite and its updates: the files' names and content; empty where it has none.

    Both formats of sources.list(5) are read. A host of another distribution has none, and mmdebstrap knows the default.
    """
    lists = [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]
    stanzas = sorted(apt.glob("sources.list.d/*.sources"))
    lines = [line for path in lists if path.is_file() for line in _lines(path.read_text(errors="replace"), suite)]
    blocks = [block for path in stanzas if path.is_file() for block in _stanzas(path.read_text(errors="replace"), suite)]
    if not any(suite in text.split() for text in (*lines, *blocks)):
        return {}
    found = {"debian.list": "".join(f"{line}\n" for line in lines), "debian.sources": "\n".join(blocks)}
    return {name: text for name, text in found.items() if text}


def _wanted(suite: str, candidate: str) -> bool:
    return candidate == suite or candidate.startswith(f"{suite}-")


def _lines(text: str, suite: str) -> Iterator[str]:
    for line in text.splitlines():
        entry = line.partition("#")[0].strip()
        match = _ONE_LINE.match(entry)
        if match and _wanted(suite, match["suite"]) and not match["uri"].startswith("cdrom:"):
            yield entry


def _stanzas(text: str, suite: str) -> Iterator[str]:
    lines = "\n".join(line.rstrip() for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n{2,}", lines.strip()):
        # A line that begins with a blank continues the field above it.
        fields = {key.strip().lower(): value for key, _, value in (field.partition(":") for field in re.split(r"\n(?=\S)", stanza))}
        suites = [candidate for candidate in fields.get("suites", "").split() if _wanted(suite, candidate)]
        if suites and "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").strip().lower() not in ("no", "false", "0"):
            kept = fields | {"types": " deb", "suites": " " + " ".join(suites)}
            yield "".join(f"{key.title()}:{value}\n" for key, value in kept.items())


def keyrings(sources: Iterable[str]) -> set[Path]:
    """The files with keys that sources name by path."""
    return {Path(path) for text in sources for path in _SIGNED_BY.findall(text)}
