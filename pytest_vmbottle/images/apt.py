"""This host's APT sources, reused for the images that are built here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["apt_sources", "keyrings"]

_ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>(?:\s.*)?)$")
_SIGNED_BY = re.compile(r"signed-by\s*[:=]\s*(/[^\s\],]+)", re.IGNORECASE)
# Debian's releases lie side by side in one archive, and the one keyring has the keys of all that are current.
_RELEASES = ("bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable")
_POCKETS = ("", "-updates", "-security")
_KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")
_ARCHIVES = ("debian", "debian-security")


def apt_sources(suite: str, apt: Path = Path("/etc/apt")) -> dict[str, str]:
    """Return this host's APT sources for a suite and its updates, as file names and contents.

    Empty if the host has none.

    Both formats of sources.list(5) are read. If they are for another release of Debian, the release's name is replaced in the sources of
    Debian itself, because its archive has all releases. A host of another distribution has none, and mmdebstrap uses its default.
    """
    lists = [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]
    stanzas = sorted(apt.glob("sources.list.d/*.sources"))
    sources = [
        *(each for path in lists if path.is_file() for each in _lines(path.read_text(errors="replace"))),
        *(each for path in stanzas if path.is_file() for each in _stanzas(path.read_text(errors="replace"))),
    ]
    chosen = _narrowed(sources, suite) or _of_another_release(sources, suite)
    found = {
        "debian.list": "".join(source.text for source in chosen if not source.stanza),
        "debian.sources": "\n".join(source.text for source in chosen if source.stanza),
    }
    return {name: text for name, text in found.items() if text}


@attrs.frozen(kw_only=True)
class _Source:
    """One APT source, split at its suites."""

    head: str
    suites: tuple[str, ...]
    tail: str
    uris: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str
    stanza: bool

    @property
    def text(self) -> str:
        return f"{self.head}{' '.join(self.suites)}{self.tail}\n"

    @property
    def is_debians(self) -> bool:
        """Tell whether it is Debian's archive or a mirror of it, and no third party's."""
        keys = self.signed_by.replace(",", " ").split()
        # True without keys as well: then apt's global keys apply, and the address has to say whose archive it is. A key that stands in the
        # stanza itself is not in the list, so such a source counts as a third party's.
        named = all(key in _KEYRINGS for key in keys)
        return named and "main" in self.components and (bool(keys) or all(map(_is_archive, self.uris)))


def _is_archive(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    return (parts.hostname or "").endswith(".debian.org") or parts.path.rstrip("/").rpartition("/")[2] in _ARCHIVES


def _narrowed(sources: Iterable[_Source], suite: str) -> list[_Source]:
    """Return the sources for a suite and its updates; none if the suite itself is missing."""
    kept = [
        attrs.evolve(source, suites=tuple(each for each in source.suites if each == suite or each.startswith(f"{suite}-")))
        for source in sources
    ]
    # Updates alone are no system.
    return [source for source in kept if source.suites] if any(suite in source.suites for source in kept) else []


def _of_another_release(sources: Iterable[_Source], suite: str) -> list[_Source]:
    """Return the host's sources for another Debian release, rewritten for this suite."""
    if suite not in _RELEASES:
        return []
    # A third party's archive need not have a folder for another release, so only Debian's own are rewritten.
    debians = [source for source in sources if source.is_debians]
    for release in _RELEASES:
        new = {f"{release}{pocket}": f"{suite}{pocket}" for pocket in _POCKETS}
        moved = [attrs.evolve(source, suites=tuple(new[each] for each in source.suites if each in new)) for source in debians]
        # Only the first release that fits: a host that mixes releases would list the same suite twice.
        if any(suite in source.suites for source in moved):
            return [source for source in moved if source.suites]
    return []


def _lines(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        # A comment may follow an entry on the same line: see sources.list(5).
        entry = line.partition("#")[0].strip()
        match = _ONE_LINE.match(entry)
        # A medium is not there when the image is built.
        if match and not match["uri"].startswith("cdrom:"):
            start, end = match.span("suite")
            signed_by = re.search(r"signed-by=(\S+)", match["options"] or "", re.IGNORECASE)
            yield _Source(
                head=entry[:start],
                suites=(match["suite"],),
                tail=entry[end:],
                uris=(match["uri"],),
                components=tuple(match["components"].split()),
                signed_by=signed_by[1] if signed_by else "",
                stanza=False,
            )


def _stanzas(text: str) -> Iterator[_Source]:
    # Without blanks at their ends, because a line of blanks may separate stanzas too: see deb822(5).
    lines = "\n".join(line.rstrip() for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n{2,}", lines.strip()):
        # A line that begins with a blank continues the field above it.
        fields = {key.strip().lower(): value for key, _, value in (field.partition(":") for field in re.split(r"\n(?=\S)", stanza))}
        suites = tuple(fields.get("suites", "").split())
        # A medium is not there when the image is built.
        uris = [uri for uri in fields.get("uris", "").split() if not uri.startswith("cdrom:")]
        if (
            suites
            and uris
            and "deb" in fields.get("types", "").split()
            and fields.get("enabled", "yes").strip().lower() not in ("no", "false", "0")
        ):
            # Without deb-src, whose lists would be downloaded for nothing. All other fields stay the host's, such as its keys and mirrors.
            kept = [(key, " deb" if key == "types" else value) for key, value in fields.items()]
            at = list(fields).index("suites")
            before, after = ("\n".join(f"{key.title()}:{value}" for key, value in part) for part in (kept[:at], kept[at + 1 :]))
            yield _Source(
                head=f"{before}\nSuites: ".lstrip(),
                suites=suites,
                tail=f"\n{after}" if after else "",
                uris=tuple(fields.get("uris", "").split()),
                components=tuple(fields.get("components", "").split()),
                signed_by=fields.get("signed-by", "").strip(),
                stanza=True,
            )


def keyrings(sources: Iterable[str]) -> set[Path]:
    """Return the files of keys that sources name by path."""
    return {Path(path) for text in sources for path in _SIGNED_BY.findall(text)}
