"""An Ethernet switch in this process.

Frames are the datagrams of unix socket pairs, which no other process on this host can see or send to.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import SystemRandom

import attrs

from pytest_vmbottle.machine.pcap import PcapFile

__all__ = ["MAX_FRAME", "Cable", "Impairment", "Port", "Switch", "is_group", "target_of"]

MAX_FRAME = 72 << 10
"""Larger than the largest frame that QEMU sends (NET_BUFSIZE in include/net/net.h)."""
_MAX_WAITING = 8 << 20
"""Bytes that may wait for one port, delayed or not yet read by its machine. Frames beyond that are dropped, as on any switch."""
_BURST = 64
"""Frames taken from a port before it is the next one's turn."""
_MAX_ADDRESSES = 1024
_HEADER, _ADDRESS, _GROUP_BIT = 14, 6, 1  # bytes of an Ethernet header, and of an address in it
# Not the module's shared generator: tests seed it and draw from it, and a LAN would change their numbers.
_random = SystemRandom()


@attrs.frozen(kw_only=True)
class Impairment:
    """What becomes of the frames in one direction of a cable.

    Attributes:
        delay: Seconds by which a frame is delayed.
        jitter: Seconds by which that is more or less, at random; frames may overtake each other.
        loss: Probability that a frame is lost, 0 to 1.
        duplicate: Probability that it comes twice.
        reorder: Probability that it is held back, so that later ones come first.
        corrupt: Probability that one of its bits is wrong.
        bandwidth: Bytes in a second; 0 is no limit.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    bandwidth: float = 0.0

    def passed(self, frame: bytes) -> list[tuple[float, bytes]]:
        """Return what comes of a frame: nothing, or it, perhaps twice, each time with its delay in seconds."""
        if self == _PERFECT:
            return [(0.0, frame)]
        if _chance(self.loss):
            return []
        copies = 1 + _chance(self.duplicate)
        return [(self._delayed(), _with_wrong_bit(frame) if _chance(self.corrupt) else frame) for _ in range(copies)]

    def _delayed(self) -> float:
        held = max(self.delay, _HELD) if _chance(self.reorder) else 0.0
        return max(0.0, self.delay + held + self.jitter * _random.uniform(-1, 1))


def target_of(frame: bytes) -> bytes:
    """Return the address that a frame is for."""
    return frame[:_ADDRESS]


def is_group(address: bytes) -> bool:
    """Tell whether a frame to an address goes to all: the lowest bit of its first byte marks groups, broadcast among them (IEEE 802.3)."""
    return bool(address[0] & _GROUP_BIT)


_PERFECT = Impairment()
_HELD = 0.02
"""Seconds by which a frame is held back at least to come out of order."""


def _chance(probability: float) -> bool:
    # Drawn only where it matters: a LAN carries many frames.
    return probability > 0 and _random.random() < probability


def _with_wrong_bit(frame: bytes) -> bytes:
    # Behind the addresses, so that the frame still arrives, and its checksums are what notices.
    place = _random.randrange(8 * min(len(frame) - 1, 2 * _ADDRESS + 2), 8 * len(frame))
    return frame[: place // 8] + bytes([frame[place // 8] ^ 1 << place % 8]) + frame[place // 8 + 1 :]


@attrs.define(eq=False)
class Cable:
    """One direction of a cable.

    Attributes:
        impairment: What becomes of its frames; may be set at any time, from any thread.
    """

    impairment: Impairment = _PERFECT
    _free: float = 0.0

    def passed(self, frame: bytes) -> list[tuple[float, bytes]]:
        """Return what comes of a frame, as `Impairment.passed` does, with the time that the frames before it take."""
        impairment = self.impairment
        came = impairment.passed(frame)
        if not impairment.bandwidth:
            return came
        now = time.monotonic()
        slow = []
        for delay, copy in came:
            self._free = max(now, self._free) + len(copy) / impairment.bandwidth
            slow.append((self._free - now + delay, copy))
        return slow


@attrs.define(eq=False)
class Port:
    """A machine's port at the switch.

    Attributes:
        name: The machine's name.
        wire: The switch's end of the cable.
        outgoing: The direction from the machine.
        incoming: The direction to it.
    """

    name: str
    wire: socket.socket
    outgoing: Cable = attrs.field(factory=Cable)
    incoming: Cable = attrs.field(factory=Cable)
    _waiting: list[tuple[float, int, bytes]] = attrs.field(factory=list)
    _bytes: int = 0
    # A heap is not stable: frames that are due at the same moment are ordered by their number.
    _order: itertools.count[int] = attrs.field(factory=itertools.count)
    blocked: bool = False

    def accept(self, frame: bytes, delay: float) -> None:
        """Queue a frame for this port, to be sent after `delay` seconds."""
        for more, copy in self.incoming.passed(frame):
            # Full: the frame is dropped, as a real switch does. A guest that does not read must not fill the host's memory.
            if self._bytes + len(copy) <= _MAX_WAITING:
                # Frames that are due at the same time keep their order: TCP takes reordered frames for lost ones.
                heapq.heappush(self._waiting, (time.monotonic() + delay + more, next(self._order), copy))
                self._bytes += len(copy)

    def due(self) -> float | None:
        """Return the time at which the next frame is due.

        None if no frame waits, or while the machine does not read.
        """
        return self._waiting[0][0] if self._waiting and not self.blocked else None

    def flush(self) -> None:
        """Send the frames that are due."""
        self.blocked = False
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            try:
                self.wire.send(self._waiting[0][2])
            except (BlockingIOError, InterruptedError):
                self.blocked = True
                return
            except OSError:
                pass  # the machine is gone, or the frame longer than the host allows: it is lost
            self._bytes -= len(heapq.heappop(self._waiting)[2])


class Switch:
    """A learning Ethernet switch with its own thread.

    It sends a frame to the port where the target address was last seen, or else to all other ports.

    The thread sleeps while there is nothing to forward.

    Attributes:
        cuts: Pairs of names: what the first machine sends does not come to the second one. To be replaced, not changed.
    """

    def __init__(self, name: str) -> None:
        """Start the switch's thread; `close` ends it."""
        self._selector = selectors.DefaultSelector()
        self._ports: list[Port] = []
        self._addresses: dict[bytes, Port] = {}
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # A socket pair wakes `select` from other threads.
        self._waker, self._woken = socket.socketpair()
        self._woken.settimeout(0)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._running = True
        self.cuts: frozenset[tuple[str, str]] = frozenset()
        self._record: PcapFile | None = None
        self._thread = threading.Thread(target=self._run, name=f"vmbottle-lan-{name}", daemon=True)
        self._thread.start()

    def connect(self, name: str) -> tuple[Port, socket.socket]:
        """Add a port for a machine; return it and the caller's end of its cable."""
        # Datagrams, because each is a frame and keeps its boundaries.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Without blocking: one machine that does not read must not hold up the thread, and with it the whole LAN.
        ours.settimeout(0)
        port = Port(name, ours)
        # The caller gets the port before the thread has it. Frames wait in the socket until then.
        self._ask(lambda: self._add(port))
        return port, theirs

    def capture(self, path: Path) -> None:
        """Record all frames that arrive at the switch in a new file, until it is closed; the first file counts.

        Raises:
            OSError: The file cannot be created.
        """
        if self._record is None:
            self._record = PcapFile(path)

    def disconnect(self, port: Port) -> None:
        """Remove a port, with the frames that wait for it."""
        self._ask(lambda: self._remove(port))

    def close(self) -> None:
        """Remove all ports and end the thread; may be called again."""
        if self._thread.is_alive():
            self._ask(self._end)
            self._thread.join()
            self._waker.close()

    def _ask(self, request: Callable[[], None]) -> None:
        """Run a request in the thread, which alone may touch the ports."""
        self._requests.put(request)
        with suppress(OSError):  # it has ended, with all ports
            # The thread sleeps in `select`, which a queue does not wake.
            self._waker.send(b"\0")

    def _add(self, port: Port) -> None:
        self._ports.append(port)
        self._selector.register(port.wire, selectors.EVENT_READ, port)

    def _remove(self, port: Port) -> None:
        if port in self._ports:
            self._ports.remove(port)
            self._selector.unregister(port.wire)
            port.wire.close()
            # Frames to these addresses go to all ports again, until they are seen behind another one.
            self._addresses = {address: behind for address, behind in self._addresses.items() if behind is not port}

    def _end(self) -> None:
        for port in tuple(self._ports):
            self._remove(port)
        # Here and not in `close`, so that requests made before the end are still served.
        self._running = False

    def _run(self) -> None:
        while self._running:
            for key, events in self._selector.select(self._patience()):
                if key.data is None:
                    self._serve()
                # A request that was served in this round may have removed the port.
                elif events & selectors.EVENT_READ and key.data in self._ports:
                    self._take(key.data)
            # All ports and not only those that had events, because delayed frames become due by time alone.
            for port in self._ports:
                self._give(port)
        # By the thread itself: nobody else knows when it has left `select`.
        self._selector.close()
        self._woken.close()
        if self._record is not None:
            self._record.close()

    def _patience(self) -> float | None:
        dues = [due for port in self._ports if (due := port.due()) is not None]
        # None waits for events alone. A blocked port has no due time: the selector tells when it can be written to.
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _serve(self) -> None:
        with suppress(BlockingIOError):
            # Before the queue is emptied. Else the byte of a request that comes in between would be taken without its request, which then
            # waits for the next one.
            self._woken.recv(4096)
        while not self._requests.empty():
            self._requests.get()()

    def _take(self, port: Port) -> None:
        # In bursts, so that one busy port does not keep the others waiting.
        for _ in range(_BURST):
            try:
                frame = port.wire.recv(MAX_FRAME)
            except OSError:  # no more for now; a machine that is gone sends nothing either, until it is disconnected
                return
            # Hostile or broken: it has no complete addresses.
            if len(frame) < _HEADER:
                continue
            if self._record is not None:
                with suppress(OSError):  # a full disk must not stop the LAN
                    self._record.write(frame)
            # Recorded before the loss, so that the recording has what the machine sent.
            for delay, copy in port.outgoing.passed(frame):
                self._forward(port, copy, delay)

    def _forward(self, port: Port, frame: bytes, delay: float) -> None:
        target, source = target_of(frame), frame[_ADDRESS : 2 * _ADDRESS]
        # A hostile guest may send from ever new addresses, and the table must not grow without end.
        if source in self._addresses or len(self._addresses) < _MAX_ADDRESSES:
            self._addresses[source] = port
        known = None if is_group(target) else self._addresses.get(target)
        for other in self._ports if known is None else (known,):
            if other is not port and (port.name, other.name) not in self.cuts:
                # The sender's delay; `accept` adds the receiver's, as of two cables in a row.
                other.accept(frame, delay)

    def _give(self, port: Port) -> None:
        """Send the frames that are due, and watch for writability only while the machine does not read."""
        before = port.blocked
        port.flush()
        if port.blocked != before:
            # Watched only while it blocks: a socket that can be written to would wake the selector all the time.
            writing = selectors.EVENT_WRITE if port.blocked else 0
            self._selector.modify(port.wire, selectors.EVENT_READ | writing, port)
