"""Scripts and other texts for guests: files of the package, in a folder `scripts` beside the modules that send them."""

from __future__ import annotations

import re
from importlib import resources

__all__ = ["read_script"]

_COMMENT = re.compile(r"^[ \t]*#(?!!).*\n", re.MULTILINE)
_INCLUDED = re.compile(r"^\. \./(\S+)\n", re.MULTILINE)


def read_script(package: str, name: str) -> str:
    r"""Return a script as guests get it.

    Comment lines are left out, because many scripts are sent with every command. So no line of a quoted text may begin with `#`. A line
    `. ./NAME` stands for the script of that name in the same folder, which a guest does not have.

    Args:
        package: The package: `__package__` of the module that sends it.
        name: The file's name in `scripts`.

    >>> read_script("pytest_vmbottle.machine", "lan_tell.sh").splitlines()[-1]
    'hosts "$1"'
    """
    text = (resources.files(package) / "scripts" / name).read_text(encoding="utf-8")
    return _INCLUDED.sub(lambda line: read_script(package, line[1]), _COMMENT.sub("", text))
