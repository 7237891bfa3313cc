"""References to registries of packs and images."""

from __future__ import annotations

import re

import attrs

from pytest_vmbottle.errors import SpecError

__all__ = ["DIGEST", "Reference"]

DIGEST = r"sha256:[0-9a-f]{64}"
"""Pattern of a digest."""
_REFERENCE = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(?::\d{1,5})?)/(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    rf"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}))?(?:@(?P<digest>{DIGEST}))?"
)


@attrs.frozen
class Reference:
    """Name of a repository, and perhaps of an artifact in it.

    Attributes:
        host: The registry, with its port if it has one.
        name: The repository.
        tag: The artifact's tag, or an empty text.
        digest: The digest of its manifest, or an empty text; it wins over the tag.
    """

    host: str
    name: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse `HOST/NAME`, `HOST/NAME:TAG` or `HOST/NAME@sha256:DIGEST`.

        >>> Reference.parse("registry.example:5000/team/packs:web")
        Reference(host='registry.example:5000', name='team/packs', tag='web', digest='')

        Raises:
            SpecError: It is none of these.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise SpecError(f"{text!r} is no reference to a registry: write HOST/NAME, HOST/NAME:TAG or HOST/NAME@sha256:DIGEST")
        return cls(*(match[part] or "" for part in ("host", "name", "tag", "digest")))

    @property
    def repository(self) -> str:
        """The repository with its host, as a text."""
        return f"{self.host}/{self.name}"

    @property
    def artifact(self) -> str:
        """The digest, or else the tag."""
        return self.digest or self.tag
