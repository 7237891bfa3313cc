"""Synchronous client for QMP, over `qemu.qmp`.

One background thread runs the protocol for all machines of this process.

That thread also starts the QEMU processes. The kernel sends a parent-death signal when the *thread* that started a process ends, not
when the process does, and this one lives as long as the interpreter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.ownership import Owner

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

__all__ = ["Qmp", "QmpFailed", "QmpLost", "in_background"]

_T = TypeVar("_T")
_STATE = "state"
_PACE = 1 << 40
"""Bytes per second for writing a state: more than any disk takes. QEMU's own limit is 128 MiB (max-bandwidth)."""
log = logging.getLogger(__name__)


class QmpFailed(VMBottleError):
    """QEMU refused a command, or cannot be reached."""


class QmpLost(QmpFailed):
    """QEMU has ended, or will in a moment.

    Its monitor is closed before its process is gone.
    """


def _loop() -> asyncio.AbstractEventLoop:
    return _loop_of(os.getpid())


@cache
def _loop_of(_: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of a process.

    A forked child has none of its parent's threads, and must not touch the descriptors that they watch.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vmbottle-qemu", daemon=True).start()
    return loop


def _await(coroutine: Coroutine[Any, Any, _T], deadline: Deadline) -> _T:
    # The time-out is inside, so that it cancels the coroutine in its own loop.
    future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, deadline.remaining), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def in_background(function: Callable[[], _T]) -> _T:
    """Call a short function in the background thread, and return its result.

    That thread outlives all others.
    """

    async def call() -> _T:
        return function()

    return asyncio.run_coroutine_threadsafe(call(), _loop()).result()


class _Latest(EventListener):
    """Listener that counts resets and keeps the latest events, one of each kind.

    A guest can cause events without end.
    """

    def __init__(self) -> None:
        super().__init__(("GUEST_PANICKED", "BLOCK_IO_ERROR", "RESET"))
        self.resets = 0
        self.said: dict[tuple[str, str], Mapping[str, object]] = {}

    async def put(self, event: Message) -> None:
        if self.accept(event):
            self.resets += event["event"] == "RESET"
            told: Mapping[str, object] = event.get("data", {})  # type: ignore[assignment]
            self.said[str(event["event"]), str(told.get("action", ""))] = told  # of actions QEMU has only a few


class _Port(EventListener):
    """Listener that counts how often a serial port was opened or closed in the guest."""

    def __init__(self, port: str) -> None:
        super().__init__("VSERPORT_CHANGE", lambda event: event.get("data", {}).get("id") == port)  # type: ignore[attr-defined]
        self.count = 0

    async def put(self, event: Message) -> None:
        if self.accept(event):
            self.count += 1


class Qmp:
    """A connection to the monitor of one QEMU process."""

    def __init__(self, sock: socket.socket, *, deadline: Deadline) -> None:
        """Connect over a connected socket; raise `QmpFailed` on failure."""
        self._owner = Owner()
        self._client = QMPClient("vmbottle")
        # A descriptor is sent at once, while its command waits in a queue, and QEMU gives a command the descriptor that came last.
        self._passing = asyncio.Lock()
        # It logs every lost connection as an error; a machine that ends is an everyday thing here.
        self._client.logger.setLevel(logging.CRITICAL)
        # Only these: the history is kept, and a guest can cause others without end.
        self._events = EventListener("MIGRATION")
        self._client.register_listener(self._events)
        self._latest = _Latest()
        self._client.register_listener(self._latest)
        self._ports = {name: _Port(name) for name in ("agentport", "runnerport")}
        for port in self._ports.values():
            self._client.register_listener(port)
        self._guard(self._client.connect(sock), deadline, "the greeting")

    def _guard(self, coroutine: Coroutine[Any, Any, _T], deadline: Deadline, what: str) -> _T:
        if not self._owner.is_us:
            # Never awaited, it would print a warning when it is collected.
            coroutine.close()
            raise QmpFailed(f"{what}: only process {self._owner.pid} may use this QEMU, because it started it")
        try:
            return _await(coroutine, deadline)
        except TimeoutError as error:
            raise QmpFailed(f"timed out waiting for QEMU: {what}") from error
        except ExecuteError as error:
            raise QmpFailed(f"QEMU refused {what}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpLost(f"the connection to QEMU's monitor is lost: {what}: {error}") from error

    def execute(self, command: str, *, deadline: Deadline, **arguments: Any) -> Any:
        """Run a command and return its answer.

        Underscores in argument names stand for dashes.
        """
        return self.call(command, {name.replace("_", "-"): value for name, value in arguments.items()}, deadline=deadline)

    def call(self, command: str, arguments: Mapping[str, Any], *, deadline: Deadline) -> Any:
        """Run a command with arguments of any names, and return its answer."""
        return self._guard(self._client.execute(command, dict(arguments)), deadline, command)

    def migrate(
        self,
        verb: Literal["migrate", "migrate-incoming"],
        file: Path,
        *,
        capabilities: Mapping[str, bool],
        by_name: bool,
        deadline: Deadline,
    ) -> None:
        """Write the machine's state to an existing file, or read it from there.

        Args:
            verb: The direction: write or read.
            file: The file's absolute path.
            capabilities: Migration capabilities to turn on or off, the same in both directions.
            by_name: Whether QEMU opens the file. Otherwise it gets the descriptor, since an older QEMU could open it only through a shell.
            deadline: Deadline of the migration.

        Raises:
            QmpFailed: The migration was not completed.
        """
        self._events.clear()  # what came of an earlier one
        # Both ends must agree, and what an earlier migration of this QEMU has set stays set.
        wanted = [{"capability": name, "state": state} for name, state in capabilities.items()]
        self.execute("migrate-set-capabilities", capabilities=wanted, deadline=deadline)
        self.execute("migrate-set-parameters", max_bandwidth=_PACE, deadline=deadline)
        if by_name:
            address = {"transport": "file", "filename": str(file), "offset": 0}
            self.execute(verb, channels=[{"channel-type": "main", "addr": address}], deadline=deadline)
        else:
            with file.open("rb" if verb == "migrate-incoming" else "r+b") as opened:
                self.lend(opened.fileno(), _STATE, deadline=deadline)
            self.execute(verb, uri=f"fd:{_STATE}", deadline=deadline)
        if self._guard(self._migrated(), deadline, verb) == "failed":
            raise QmpFailed(f"QEMU could not complete {verb}")
        # "completed" is said a moment before a machine that was written down can go on ("Migration is not finalized yet").
        if verb == "migrate" and not deadline.poll(lambda: not self._is_finishing(deadline), every=0.01):
            raise QmpFailed("timed out waiting for QEMU to finish migrate")

    def _is_finishing(self, deadline: Deadline) -> bool:
        return bool(self.execute("query-status", deadline=deadline)["status"] == "finish-migrate")

    def lend(self, file: int, name: str, *, deadline: Deadline) -> None:
        """Pass a descriptor to QEMU, which keeps a copy under a name until a command uses it."""
        self._guard(self._send_fd(file, name), deadline, "getfd")

    async def _send_fd(self, file: int, name: str) -> None:
        async with self._passing:
            self._client.send_fd_scm(file)
            await self._client.execute("getfd", {"fdname": name})

    def add_fd(self, file: int, *, deadline: Deadline) -> int:
        """Pass an open file to QEMU; return the N of `/dev/fdset/N`, by which QEMU opens it in the same mode."""
        return self._guard(self._add_fd(file, "fdset-id"), deadline, "add-fd")

    def pass_file(self, file: int, *, deadline: Deadline) -> Path:
        """Pass an open file to QEMU; return the path by which it can open it, for what knows nothing of `/dev/fdset`."""
        return Path(f"/proc/self/fd/{self._guard(self._add_fd(file, 'fd'), deadline, 'add-fd')}")

    async def _add_fd(self, file: int, answered: str) -> int:
        async with self._passing:
            self._client.send_fd_scm(file)
            answer = await self._client.execute("add-fd")
        return int(answer[answered])  # type: ignore[index]

    async def _migrated(self) -> str:
        async for message in self._events:
            status = str(message.get("data", {}).get("status", ""))  # type: ignore[attr-defined]
            if message["event"] == "MIGRATION" and status in ("completed", "failed"):
                return status
        raise EOFError("its monitor was closed")

    def seen(self, event: str, **data: object) -> bool:
        """Tell whether an event with this data has come, since it was last forgotten."""
        # Copied, because the background thread adds entries meanwhile.
        said = [told for (name, _), told in tuple(self._latest.said.items()) if name == event]
        return any(all(told.get(key) == value for key, value in data.items()) for told in said)

    def forget(self, event: str) -> None:
        """Forget what has come of this event so far."""
        self._latest.said = {key: told for key, told in tuple(self._latest.said.items()) if key[0] != event}

    @property
    def resets(self) -> int:
        """The number of resets of the machine."""
        return self._latest.resets

    def changes(self, port: str) -> int:
        """Return how often a serial port, by the id of its device, was opened or closed in the guest."""
        return self._ports[port].count

    def is_open(self, port: str, *, deadline: Deadline) -> bool:
        """Tell whether a program in the guest has a port open now, by the name of what it is connected with here."""
        known = self.execute("query-chardev", deadline=deadline)
        # Asked, because the events of the port tell of changes alone, and are only counted here.
        return any(each["label"] == port and each["frontend-open"] for each in known)

    def save_devices(self, file: int, *, deadline: Deadline) -> None:
        """Write the state of a stopped machine's devices, without its memory and without a description of the machine, into an open file.

        It takes some milliseconds. The command is meant for Xen, and needs none.

        Raises:
            QmpFailed: QEMU did not.
        """
        # For writing alone: QEMU takes a descriptor only in the mode in which it would have opened the file.
        writer = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            number = self.add_fd(writer, deadline=deadline)
        finally:
            os.close(writer)
        try:
            # Not "live": then QEMU would give up its disks.
            self.execute("xen-save-devices-state", filename=f"/dev/fdset/{number}", live=False, deadline=deadline)
        finally:
            self.execute("remove-fd", fdset_id=number, deadline=deadline)

    def close(self) -> None:
        """Close the connection; QEMU runs on. May be called again.

        A forked child, which does not own it, leaves it alone.
        """
        if not self._owner.is_us:
            return
        try:
            _await(self._client.disconnect(), Deadline(2))
        except (QMPError, OSError, EOFError, TimeoutError) as error:
            log.debug("the monitor was closed by the other side: %s", error)
