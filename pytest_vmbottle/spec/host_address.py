"""Addresses of other hosts, on which workers run."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs

from pytest_vmbottle.errors import SpecError

__all__ = ["HostAddress"]

_FORM = "ssh://[USER@]HOST[:PORT][/FOLDER][?python=PATH&catalog=DIR&config=FILE]"
# No word begins with a hyphen, which ssh would take for an option.
_WORD = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.:%-]*")
_OPTIONS = ("python", "catalog", "config")


@attrs.frozen(kw_only=True)
class HostAddress:
    """Address of a host that is reached by ssh.

    Attributes:
        host: Its name or address, or an alias of ssh's configuration.
        user: The user there; empty for ssh's own choice.
        port: The port; 0 for ssh's own choice.
        folder: The folder there that gets the project's copies; empty for the one for temporary files.
        python: The interpreter there, which has the plugin.
        catalog: The catalog there; empty for that user's own.
        config: The configuration file for ssh, on this host; empty for the user's own.
    """

    host: str
    user: str = ""
    port: int = 0
    folder: str = ""
    python: str = "python3"
    catalog: str = ""
    config: str = ""

    @classmethod
    def parse(cls, text: str) -> HostAddress:
        """Parse an address.

        >>> HostAddress.parse("ssh://ann@lab:2222?python=/opt/venv/bin/python").python
        '/opt/venv/bin/python'

        Raises:
            SpecError: It is none.
        """
        try:
            parts = urlsplit(text)
            port = parts.port or 0
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        except ValueError:
            raise SpecError(f"takes {_FORM}, not {text!r}") from None
        host, user = parts.hostname or "", unquote(parts.username or "")
        wrong = [name for name in options if name not in _OPTIONS] or parts.password is not None or parts.fragment
        if wrong or parts.scheme != "ssh" or not _WORD.fullmatch(host) or not (_WORD.fullmatch(user) or not user):
            raise SpecError(f"takes {_FORM}, not {text!r}")
        # urlsplit makes a host's name lower-case, which an alias of ssh's configuration need not be.
        named = re.search(re.escape(host), parts.netloc.rpartition("@")[2], re.IGNORECASE)
        return cls(host=named[0] if named else host, user=user, port=port, folder=unquote(parts.path).rstrip("/"), **options)

    @classmethod
    def parse_all(cls, text: str) -> tuple[HostAddress, ...]:
        """Parse addresses that commas separate; none of an empty text.

        Raises:
            SpecError: One of them is none, or is there twice.
        """
        found = tuple(cls.parse(each.strip()) for each in text.split(",") if each.strip())
        if len(set(map(str, found))) < len(found):
            raise SpecError(f"takes each host once, not {text!r}")
        return found

    def __str__(self) -> str:
        """Return the address without its options, as messages name the host."""
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"ssh://{user}{self.host}{port}"

    @property
    def options(self) -> tuple[str, ...]:
        """The words for ssh's command line that lead to the host."""
        config = ("-F", self.config) if self.config else ()
        port = ("-p", str(self.port)) if self.port else ()
        user = ("-l", self.user) if self.user else ()
        return (*config, *port, *user)
