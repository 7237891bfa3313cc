"""Transfers of large data to and from a guest, over a hot-plugged disk or else SSH.

A disk carries the bytes past the guest's network, past encryption and past base64, in requests as large as the guest likes. The host's file
itself is that disk, so that nothing is copied twice and nothing has to be deleted. Without KVM, 1 MiB takes about as long by any way (1.0 s
by a disk, 1.1 s by SSH once it has logged in, 1.2 s by the guest agent), and 4 MiB take 0.9, 5.4 and 4.1 s. Logging in takes 3 s.
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

from pytest_vmbottle.backends.port import Instance, NotPlugged
from pytest_vmbottle.channels.port import Command, Finished
from pytest_vmbottle.errors import Unsupported, VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script
from pytest_vmbottle.host.sizes import format_size

__all__ = ["Bulk"]

_SLACK = 16 << 20
"""Bytes by which the disk for a guest's output is larger than expected."""

_UNSEEN = 79
"""Exit status of our scripts if no disk came up; no command of ours ends with it."""
_SECTOR = 512
_PUT = read_script(__package__, "bulk_put.sh")
_PUT_FRAMED = read_script(__package__, "bulk_put_framed.sh")
_GET = read_script(__package__, "bulk_get.sh")
_EVERY = 5.0
"""Seconds between two progress messages of a copy."""
log = logging.getLogger(__name__)


class Bulk:
    """Transport for commands with large input or output."""

    def __init__(self, instance: Instance) -> None:
        """Take the instance to use."""
        self._instance = instance
        # Until the contrary is seen. It is remembered for this instance only, since another kernel may boot in the next one.
        self._has_disks = True

    def put(self, source: BinaryIO, size: int, command: Command, *, deadline: Deadline, framed: bool = False) -> Finished:
        """Run a command with `size` bytes of a host file as its input.

        Args:
            source: The file.
            size: Number of bytes to read from it.
            command: The command to run.
            deadline: Deadline of the whole transfer.
            framed: Whether the command finds the end of its input by itself, as `tar` does. Then it reads the disk without a pipe, which
                takes half of the time in an emulated guest.

        Raises:
            MachineError: The guest can no longer be reached.
            OSError: The file changed during the transfer.
        """
        if self._has_disks:
            # The size is checked at both ends: QEMU pads a file that shrank with zeros, and the guest cannot tell them from data.
            with _as_file(source, size) as file:
                finished = self._by_disk(_PUT_FRAMED if framed else _PUT, command, file, size, deadline, writable=False)
                if os.fstat(file).st_size != size:  # what was read behind its end was zeros
                    raise OSError(errno.EIO, "the file changed while it was copied")
            if finished is not None:
                return finished
        with _reporting(source.tell, size):
            return self._instance.channel(deadline=deadline, bulk=True).put(source, command, deadline=deadline)

    def get(self, command: Command, sink: BinaryIO, size: int, *, deadline: Deadline) -> Finished:
        """Run a command and write its standard output to an empty file of the host.

        Args:
            command: The command to run.
            sink: The file to write to.
            size: The most bytes that are expected; a disk holds little more.
            deadline: Deadline of the whole transfer.

        Raises:
            MachineError: The guest can no longer be reached.
            OSError: The host's disk is full.
        """
        if self._has_disks:
            # The size is an estimate, and a tree may grow while it is packed. Room that is not used costs nothing.
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
            # The guest sees an I/O error only, and its program fails of it. That the host's disk is full is known here alone.
            if finished is not None and not finished.timed_out and finished.returncode and _is_full(file):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (on the host)")
            # A number from the guest: it says how much of the disk is output, and may be anything.
            os.ftruncate(file, min(written, room))
            os.lseek(file, 0, os.SEEK_END)
        # The number of bytes was for us, and is no output of the command.
        return finished and attrs.evolve(finished, stdout=b"")

    def _by_disk(  # noqa: PLR0913 - all that makes one run
        self, script: str, command: Command, file: int, size: int, deadline: Deadline, *, writable: bool
    ) -> Finished | None:
        """Run a command by a script that waits for the disk.

        Return None if there is no disk; then the command was not run.
        """
        # A random serial, because the guest may still have an earlier disk in its list.
        serial = f"vmb-{secrets.token_hex(8)}"
        # With `evolve`, so that it keeps its tag: a time-out kills the script with all that it started.
        wrapped = attrs.evolve(command, argv=("/bin/sh", "-c", script, "sh", serial, str(size), *command.argv))
        channel = self._instance.channel(deadline=deadline)
        try:
            with self._instance.disk(file, serial=serial, writable=writable, deadline=deadline) as moved, _reporting(moved, size):
                finished = channel.run(wrapped, deadline=deadline)
        # The backend has none at all, so it is not asked again.
        except Unsupported:
            self._has_disks = False
            return None
        # This one could not be plugged in, for example because another copy has the port; the next may be.
        except NotPlugged as error:
            log.info("copying by SSH: %s", error)
            return None
        # The script waited for the disk and gave up before it ran the command, so running it again by SSH is safe.
        if finished.returncode == _UNSEEN:
            log.info("copying by SSH from now on: the guest does not see a disk that is plugged in while it runs")
            self._has_disks = False
            return None
        return finished


def _count(finished: Finished) -> int:
    said = finished.stdout.strip()
    # Bounded, because `int` raises an error of its own for thousands of digits.
    return int(said) if said.isdigit() and len(said) < 20 else 0  # noqa: PLR2004 - of 64 bits


def _is_full(file: int) -> bool:
    status = os.fstatvfs(file)
    # `f_bavail` and not `f_bfree`: blocks that are reserved for root help nobody else.
    return status.f_bavail * status.f_frsize < 1 << 20


@contextmanager
def _as_file(source: BinaryIO, size: int) -> Iterator[int]:
    """Yield a read-only descriptor of a file with the content of `source`."""
    with tempfile.TemporaryFile() as own:
        try:
            # A disk begins at the beginning of its file, so a file that was read in part has to be copied.
            file, whole = source.fileno(), source.tell() == 0
        # A file in memory, such as BytesIO, has no descriptor for QEMU.
        except UnsupportedOperation:
            file, whole = -1, False
        if not whole:
            start = source.tell()
            shutil.copyfileobj(source, own, 1 << 20)
            own.flush()
            # As it was: if there is no disk in the end, SSH reads the source from here.
            source.seek(start)
            file = own.fileno()
        elif os.fstat(file).st_size != size:
            raise OSError(errno.EIO, "the file changed while it was copied")
        # Opened anew for reading: QEMU gets a descriptor that cannot write, whatever the guest does.
        reader = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield reader
        finally:
            os.close(reader)


@contextmanager
def _own_file(sink: BinaryIO) -> Iterator[int]:
    """Yield a descriptor of an empty file, and copy its content to `sink` afterwards."""
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
    """Log the progress of a copy every few seconds."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(_EVERY):
            # ValueError is that of a file which was closed meanwhile. A report that fails must not end the copy.
            with suppress(VMBottleError, OSError, ValueError):
                log.info("copied %s of about %s", format_size(moved()), format_size(size))

    # A thread, because the copy itself is one call that blocks until its end.
    thread = threading.Thread(target=report, name="vmbottle-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
