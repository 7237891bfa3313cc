"""Much data to and from a guest, by the quickest way there is: a disk that is plugged in for it, or else SSH.

A disk carries the bytes past the guest's network, past encryption and past base64, in requests as large as the guest likes. The host's file
itself is that disk, so that nothing is copied twice and nothing has to be deleted. Without KVM, 1 MiB takes as long by any way (1.0 s by a
disk, 1.1 s by SSH once it has logged in, 1.2 s by the guest agent), and 4 MiB 0.9, 5.4 and 4.1 s. Logging in takes 3 s.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from typing import BinaryIO

import attrs

from pytest_vmbottle._os import Deadline, format_size
from pytest_vmbottle.backend import Command, Finished, Hotplug, Instance, NotPlugged
from pytest_vmbottle.errors import VMBottleError

__all__ = ["Bulk"]

_SLACK = 16 << 20
"""Bytes by which a disk for a guest's answer is larger than expected."""

_UNSEEN = 79
"""What our script ends with where no disk came up: that of a command of ours is never this."""
_SECTOR = 512
# $1 the serial number, $2 bytes, then the command. A disk is there a moment after it was plugged in.
_FIND = rf"""
serial=$1 size=$2; shift 2; n=0
until disk=$(grep -lsx -e "$serial" /sys/block/*/serial); do
  n=$((n + 1)); [ $n -le 100 ] || exit {_UNSEEN}; sleep 0.1 || sleep 1
done
name=${{disk#/sys/block/}}; name=${{name%/serial}}; disk=/dev/$name
until [ -b "$disk" ]; do n=$((n + 1)); [ $n -le 100 ] || exit {_UNSEEN}; sleep 0.1 || sleep 1; done
echo 4096 > "/sys/block/$name/queue/read_ahead_kb"
"""
# All but the rest by dd, whose blocks are large; `head` would take as long as the network.
_PUT = (
    _FIND
    + r"""
{ dd bs=1048576 count=$((size / 1048576)) 2>/dev/null; head -c $((size % 1048576)); } <"$disk" | "$@"
"""
)
_PUT_FRAMED = _FIND + 'exec "$@" <"$disk"'
# The file description's own position tells how much was written. The disk is synced before it goes, or the last of it would be missing.
_GET = (
    _FIND
    + r"""
exec 3<>"$disk"; "$@" >&3 || exit
sync "$disk" 2>/dev/null || sync
exec sed -n 's/^pos:[^0-9]*//p' /proc/$$/fdinfo/3
"""
)
_EVERY = 5.0
"""Seconds between two lines about a copy that takes long."""
log = logging.getLogger(__name__)


class Bulk:
    """Runs commands that take or give much data."""

    def __init__(self, instance: Instance) -> None:
        """Takes the machine."""
        self._instance = instance
        self._hotplug = instance if isinstance(instance, Hotplug) else None

    def put(self, source: BinaryIO, size: int, command: Command, *, deadline: Deadline, framed: bool = False) -> Finished:
        """Runs a command with the `size` bytes of a host file as its input.

        Args:
            source: The file.
            size: How many there are in it.
            command: What to run.
            deadline: When it has to be done.
            framed: Whether the command knows by itself where its input ends, as `tar` does. Then it reads from the disk without a pipe
                between them, which takes half of the time of an emulated guest.

        Raises:
            MachineError: The guest cannot be reached any more.
            OSError: The file changed meanwhile.
        """
        if self._hotplug is not None:
            with _as_file(source, size) as file:
                finished = self._by_disk(_PUT_FRAMED if framed else _PUT, command, file, size, deadline, writable=False)
                if os.fstat(file).st_size != size:  # what was read behind its end was zeros
                    raise OSError(errno.EIO, "the file changed while it was copied")
            if finished is not None:
                return finished
        with _reporting(source.tell, size):
            return self._instance.channel(deadline=deadline, bulk=True).put(source, command, deadline=deadline)

    def get(self, command: Command, sink: BinaryIO, size: int, *, deadline: Deadline) -> Finished:
        """Runs a command and writes its standard output to an empty file of the host.

        Args:
            command: What to run.
            sink: Where to.
            size: Bytes that it is not expected to give more of; of a disk, there are not many more.
            deadline: When it has to be done.

        Raises:
            MachineError: The guest cannot be reached any more.
            OSError: The host's disk is full.
        """
        if self._hotplug is not None:
            finished = self._get_by_disk(command, sink, size + _SLACK, deadline)
            if finished is not None:
                return finished
        with _reporting(sink.tell, size):
            return self._instance.channel(deadline=deadline, bulk=True).get(command, sink, deadline=deadline)

    def _get_by_disk(self, command: Command, sink: BinaryIO, room: int, deadline: Deadline) -> Finished | None:
        with _own_file(sink) as file:
            os.ftruncate(file, -(-room // _SECTOR) * _SECTOR)  # it takes no space until it is written to
            finished = self._by_disk(_GET, command, file, room, deadline, writable=True)
            written = _count(finished) if finished is not None else 0
            if finished is not None and not finished.timed_out and finished.returncode and _is_full(file):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (on the host)")
            os.ftruncate(file, min(written, room))
            os.lseek(file, 0, os.SEEK_END)
        return finished and attrs.evolve(finished, stdout=b"")

    def _by_disk(  # noqa: PLR0913 - all that makes one run
        self, script: str, command: Command, file: int, size: int, deadline: Deadline, *, writable: bool
    ) -> Finished | None:
        """Runs a command by a script that has found the disk, or returns None: it was not run, because there is no disk."""
        if self._hotplug is None:
            return None
        serial = f"vmb-{secrets.token_hex(8)}"
        wrapped = attrs.evolve(command, argv=("/bin/sh", "-c", script, "sh", serial, str(size), *command.argv))
        channel = self._instance.channel(deadline=deadline)
        try:
            with self._hotplug.disk(file, serial=serial, writable=writable, deadline=deadline) as moved, _reporting(moved, size):
                finished = channel.run(wrapped, deadline=deadline)
        except NotPlugged as error:
            log.info("copying by SSH: %s", error)
            return None
        if finished.returncode == _UNSEEN:
            log.info("copying by SSH from now on: the guest does not see a disk that is plugged in while it runs")
            self._hotplug = None
            return None
        return finished


def _count(finished: Finished) -> int:
    said = finished.stdout.strip()
    return int(said) if said.isdigit() and len(said) < 20 else 0  # noqa: PLR2004 - of 64 bits


def _is_full(file: int) -> bool:
    status = os.fstatvfs(file)
    return status.f_bavail * status.f_frsize < 1 << 20


@contextmanager
def _as_file(source: BinaryIO, size: int) -> Iterator[int]:
    """A descriptor, only for reading, of a file with this content."""
    with tempfile.TemporaryFile() as own:
        try:
            file, whole = source.fileno(), source.tell() == 0
        except UnsupportedOperation:
            file, whole = -1, False
        if not whole:
            start = source.tell()
            shutil.copyfileobj(source, own, 1 << 20)
            own.flush()
            source.seek(start)
            file = own.fileno()
        elif os.fstat(file).st_size != size:
            raise OSError(errno.EIO, "the file changed while it was copied")
        reader = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield reader
        finally:
            os.close(reader)


@contextmanager
def _own_file(sink: BinaryIO) -> Iterator[int]:
    """A descriptor of an empty file, whose content is then that of `sink`."""
    with tempfile.TemporaryFile() as own:
        try:
            file = sink.fileno()
        except UnsupportedOperation:
            file = own.fileno()
        yield file
        if file == own.fileno():
            own.seek(0)
            shutil.copyfileobj(own, sink, 1 << 20)


@contextmanager
def _reporting(moved: Callable[[], int], size: int) -> Iterator[None]:
    """Logs how far a copy is, every few seconds."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(_EVERY):
            with suppress(VMBottleError, OSError, ValueError):
                log.info("copied %s of about %s", format_size(moved()), format_size(size))

    thread = threading.Thread(target=report, name="vmbottle-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
