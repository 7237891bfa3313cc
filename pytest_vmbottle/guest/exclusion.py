"""Files that a copy leaves out, by patterns of their names and paths."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import attrs

__all__ = ["NOTHING", "Exclusion"]

_GLOB = "*?[]\\"


@attrs.frozen
class Exclusion:
    """Patterns of what is left out of a tree.

    A pattern of one part matches names at any depth, one of several parts the path below the top. No wildcard matches a slash.

    Attributes:
        patterns: The patterns by their parts.
    """

    patterns: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, exclude: str | Iterable[str]) -> Exclusion:
        """Return the exclusion for one pattern, or for several.

        Raises:
            ValueError: A pattern is empty or absolute, or has a NUL byte, `.` or `..` in it.
        """
        patterns = []
        for pattern in (exclude,) if isinstance(exclude, str) else exclude:
            # As in a .gitignore, where `build/` is a folder of this name at any depth.
            parts = tuple(pattern.removesuffix("/").split("/"))
            if any(part in ("", ".", "..") or "\0" in part for part in parts):
                raise ValueError(f'exclude={pattern!r}: takes names such as "*.pyc", and paths below the source such as "build/*.o"')
            patterns.append(parts)
        return cls(tuple(patterns))

    def matches(self, below: tuple[str, ...]) -> bool:
        """Tell whether what is at a path below the top is left out, by a pattern that means itself."""
        return any(
            fnmatchcase(below[-1], parts[0]) if len(parts) == 1 else len(parts) == len(below) and all(map(fnmatchcase, below, parts))
            for parts in self.patterns
        )

    def covers(self, below: tuple[str, ...]) -> bool:
        """Tell whether what is at a path below the top is left out, by itself or with a folder above it."""
        return any(self.matches(below[:length]) for length in range(1, len(below) + 1)) if self.patterns else False

    def tar_options(self, top: str) -> list[str]:
        """Return options by which GNU's tar leaves out a part of it, and nothing else, of a tree that it packs as `./TOP`.

        That spares the way of what would be dropped on arrival. Left out are patterns that tar could take otherwise, or for the
        top itself.
        """
        options = []
        for parts in self.patterns:
            if any(character in part for part in parts for character in "?["):
                continue
            # The dot in front of the top is a part of the path, too.
            if len(parts) == 1 and any(fnmatchcase(part, parts[0]) for part in (".", top)):
                continue
            words = [part.replace("\\", "\\\\") for part in parts]
            above = [".", "".join(f"\\{character}" if character in _GLOB else character for character in top)] if len(parts) > 1 else []
            options += [f"--{'anchored' if above else 'no-anchored'}", f"--exclude={'/'.join([*above, *words])}"]
        # The order matters to tar: these hold for the patterns behind them.
        return ["--wildcards", "--no-wildcards-match-slash", *options] if options else []


NOTHING = Exclusion()
