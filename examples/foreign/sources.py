"""Source packages of Debian 12, fetched when they are needed: nothing of them is kept here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from pytest_vmbottle.images.apt import apt_sources


class Sources:
    """An APT of our own beside this computer's, which may have no sources of source packages."""

    def __init__(self, folder: Path) -> None:
        """Read the lists of Debian 12 into a folder, from where this computer has its packages."""
        self._folder = folder
        (folder / "lists/partial").mkdir(parents=True)
        (folder / "cache/archives/partial").mkdir(parents=True)
        for name, text in apt_sources("bookworm").items():
            both = re.sub(r"^Types: deb$", "Types: deb deb-src", text, flags=re.MULTILINE)
            (folder / name).write_text(both + "".join(f"deb-src {line[4:]}\n" for line in text.splitlines() if line.startswith("deb ")))
        self._run("update")

    def unpacked(self, package: str) -> Path:
        """Return the folder of a source package, with Debian's patches in it."""
        place = self._folder / package
        place.mkdir()
        self._run("source", package, cwd=place)
        return next(path for path in place.iterdir() if path.is_dir())

    def _run(self, *words: str, cwd: Path | None = None) -> None:
        lists = next(path for name in ("debian.sources", "debian.list") if (path := self._folder / name).exists())
        here = {"Dir::Etc::SourceList": lists, "Dir::Etc::SourceParts": "/dev/null", "APT::Sandbox::User": "root"}
        here |= {"Dir::State::Lists": self._folder / "lists", "Dir::Cache": self._folder / "cache"}
        options = [f"--option={name}={value}" for name, value in here.items()]
        subprocess.run(["apt-get", *options, "--quiet", *words], cwd=cwd, check=True, stdin=subprocess.DEVNULL)
