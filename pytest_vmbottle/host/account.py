"""Users of this host, by name or number."""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path
from typing import Self

import attrs

from pytest_vmbottle.errors import SpecError

__all__ = ["Account", "user_name"]

# The number beyond it, -1, means to chown(2) and setuid(2) that nothing changes.
_LAST = 2**32 - 2


def user_name() -> str:
    """Return the name of the user that this process acts as; empty if the user has none, as in some containers."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""


@attrs.frozen(kw_only=True)
class Account:
    """User and groups that QEMU runs as.

    Attributes:
        name: The account as the user wrote it.
        uid, gid: The user's and the group's number.
        groups: The numbers of the other groups that the user is in.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an account from `user` or `user:group`.

        Either may be a number, which needs no entry in the user database.

        Raises:
            SpecError: There is no such user or group, or it is root.
        """
        user, colon, group = text.partition(":")
        uid, main, groups = _user(user, alone=not colon)
        gid = _group(group) if colon else main
        # Root's group too, to which many files of a host are open.
        if uid == 0 or gid == 0:
            raise SpecError(f"{text!r} is root, or root's group: name a user who owns nothing, such as nobody")
        return cls(name=text, uid=uid, gid=gid, groups=groups)

    def may_open(self, device: Path) -> bool:
        """Tell whether a device's mode bits let this account read and write it."""
        status = device.stat()
        # As the kernel does it: the first class that fits counts alone, even where a later one allows more.
        shift = 6 if status.st_uid == self.uid else 3 if status.st_gid in (self.gid, *self.groups) else 0
        return (status.st_mode >> shift) & 6 == 6  # noqa: PLR2004 - rw


def _user(text: str, *, alone: bool) -> tuple[int, int, tuple[int, ...]]:
    try:
        known = pwd.getpwuid(_number(text)) if text.isdecimal() else pwd.getpwnam(text)
    except KeyError:
        if text.isdecimal() and not alone:
            # The 0 is never used: a number that is not alone has a group behind its colon.
            return _number(text), 0, ()
        hint = "; a number without an entry takes a group too, as in 1234:1234" if text.isdecimal() else ""
        raise SpecError(f"there is no user {text!r} on this computer{hint}") from None
    return known.pw_uid, known.pw_gid, tuple(os.getgrouplist(known.pw_name, known.pw_gid))


def _group(text: str) -> int:
    if text.isdecimal():
        return _number(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise SpecError(f"there is no group {text!r} on this computer") from None


def _number(text: str) -> int:
    number = int(text)
    if number > _LAST:
        raise SpecError(f"{text} is not a valid id: the largest one is {_LAST}")
    return number
