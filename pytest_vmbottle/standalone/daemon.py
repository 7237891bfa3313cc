"""The daemon of one machine without pytest, behind `vmbottle machine start`.

A machine ends with the process that started it, and only that process holds its monitor and its agent. So this one stays, detached from the
terminal, and serves requests of other processes by its socket, to which only this user can connect.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle import images
from pytest_vmbottle.backends.make import make
from pytest_vmbottle.backends.port import Backend, Start
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.errors import BackendUnavailable, MachineDied, MachineError, Unsupported, VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.signals import Interruption, left
from pytest_vmbottle.host.supervisor import Identity
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.machine.shared_lan import Seat, SharedLans
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.provision.origins import KeptOrigin, Origin
from pytest_vmbottle.settings import Settings as Told
from pytest_vmbottle.shown import printable
from pytest_vmbottle.spec import MachineSpec, add_disks
from pytest_vmbottle.spec.pack_kind import PackKind
from pytest_vmbottle.standalone.client import DISK, LANS, SNAPSHOTS, Kept
from pytest_vmbottle.standalone.line import Line, listen, peer_is_us
from pytest_vmbottle.standalone.orders import PACK, forwards, source_of, spec_keywords
from pytest_vmbottle.standalone.record import ERROR, OFF, RUNNING, STOPPED, Record
from pytest_vmbottle.standalone.requests import ANSWERED_BY_THE_GUEST, Requests, told
from pytest_vmbottle.standalone.stored import Stored

__all__ = ["Daemon", "keep", "main"]

_PACE = 0.5
"""Seconds between two checks whether the machine has ended."""
# Seconds in which a client must have sent its request, and a guest must take the command to power off.
_PATIENCE = 10.0
_SHUTDOWN = 90.0
"""Seconds that a guest may take to power off."""
_LAST_WORDS = 3.0
"""Seconds in which pending requests get their answers after the machine has ended."""
# For backends without an orderly shutdown. It sleeps first, so that the command is answered before the guest goes down.
_POWER_OFF = "(sleep 0.2; poweroff) >/dev/null 2>&1 </dev/null &"


class Daemon:
    """A running machine, and the requests of other processes for it."""

    def __init__(self, machine: Machine, place: Kept, record: Record, origin: Origin) -> None:
        """Take a machine that is ready.

        Args:
            machine: The machine.
            place: Its folder.
            record: Its first record.
            origin: The image at its bottom.
        """
        self._machine, self._place, self._record = machine, place, record
        self._writing = threading.Lock()
        # Written by request threads and read by the main thread: an assignment is whole, and `_woken` tells of it.
        self._wish = ""
        self._woken = threading.Event()
        self._busy: set[threading.Thread] = set()
        self.requests = Requests(machine, place, origin, note=self.note)

    def note(self, *, ports: Mapping[int, int] | None = None, **changed: Any) -> None:
        """Write the record with other values of some fields, and with more ports."""
        with self._writing:
            changed["ports"] = {**self._record.ports, **{str(port): here for port, here in (ports or {}).items()}}
            if "state" in changed:
                changed["since"] = time.time()
            self._record = self._place.note(attrs.evolve(self._record, **changed))

    @property
    def record(self) -> Record:
        """The record as it was last written."""
        return self._record

    # -- its end ---------------------------------------------------------------------------------------------------------------------

    def watch(self, seconds: float | None = None) -> tuple[str, str]:
        """Wait until the machine ends or is to be stopped; return its last state and the reason.

        An end that nobody asked for is written into the record at once, and so is the trouble of a machine that still runs.

        Args:
            seconds: Seconds after which it is ended, if nobody asked for that before.
        """
        told = False
        # Wall-clock time, which goes on while this computer sleeps.
        until = None if seconds is None else time.time() + seconds
        while not self._woken.wait(_PACE):
            if until is not None and time.time() >= until:
                return STOPPED, f"it was ended after {seconds:.0f} s, as its test asked"
            trouble = self._trouble()
            if trouble is None:
                continue
            if not told or trouble.exitcode is not None:
                state, reason = _ending(trouble)
                self.note(state=state, reason=reason)
                told = True
            if trouble.exitcode is not None:
                return _ending(trouble)
        return STOPPED, self._power_off()

    def _trouble(self) -> MachineDied | None:
        # While it is restored it has no hypervisor for a moment, which is no end.
        with self.requests.replacing:
            try:
                self._machine.lifecycle.instance.alive()
            except MachineDied as error:
                return error
            except MachineError as error:  # a restore failed, and nothing is left to run
                return MachineDied(str(error), exitcode=1)
        return None

    def _power_off(self) -> str:
        """Power the guest off, in order unless it must end at once; return how the machine ended."""
        if self._wish == "cut":
            return "it was ended as asked, without a shutdown"
        # In a thread, so that a second request (`stop --now`) can still cut it short.
        threading.Thread(target=self._ask_for_the_end, daemon=True).start()
        deadline = Deadline(_SHUTDOWN)
        ended = deadline.poll(lambda: self._wish == "cut" or self._is_off(), every=0.2)
        if self._is_off():
            return "it was shut down as asked"
        return "it was ended before its shutdown was complete" if ended else f"it did not shut down within {_SHUTDOWN:.0f} s and was ended"

    def _ask_for_the_end(self) -> None:
        with suppress(VMBottleError):  # the channel may be cut before it has answered
            try:
                self._machine.lifecycle.instance.shut_down(deadline=Deadline(_SHUTDOWN))
            except Unsupported:
                self._machine.exec(["sh", "-c", _POWER_OFF], user="root", timeout=_PATIENCE)

    def _is_off(self) -> bool:
        return self._machine.lifecycle.instance.exitcode is not None

    def _stop(self, *, now: bool) -> None:
        # It only wakes the main thread, which ends the machine: the answer must come before the end.
        self._wish = "cut" if now else self._wish or "off"
        self._woken.set()

    # -- what is asked ---------------------------------------------------------------------------------------------------------------

    def listen(self, server: socket.socket) -> None:
        """Serve requests, each in a thread of its own, until the socket is closed."""

        def accept() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    # A thread each, because `exec` may last as long as the machine.
                    thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                    self._busy.add(thread)
                    thread.start()

        threading.Thread(target=accept, daemon=True).start()

    def finish(self) -> None:
        """Wait a moment until pending requests are answered."""
        # One for all of them: a client that hangs must not keep the daemon from ending.
        deadline = Deadline(_LAST_WORDS)
        # A copy: each request removes its thread.
        for thread in list(self._busy):
            thread.join(deadline.remaining)

    def _serve(self, sock: socket.socket) -> None:
        # A client that connects and says nothing must not hold a thread for ever.
        sock.settimeout(_PATIENCE)
        line = Line(sock)
        try:
            # Not by the socket's mode alone: the kernel tells who is at the other end.
            if peer_is_us(sock):
                request = line.receive()
                # No time-out from here on: the request may take as long as the client likes.
                sock.settimeout(None)
                if request is not None:
                    line.send(self._answer(line, request))
        except (OSError, ValueError) as error:  # whoever asked is gone, or is none of ours
            print(printable(f"a request failed: {error}"), file=sys.stderr, flush=True)  # noqa: T201 - this is the daemon's log
        finally:
            line.close()
            self._busy.discard(threading.current_thread())

    def _answer(self, line: Line, request: Mapping[str, Any]) -> dict[str, Any]:
        verb = request.get("verb")
        try:
            if verb == "stop":
                self._stop(now=request["now"])
                return {"answer": None}
            # A channel notices the end of a machine late, so the hypervisor is asked first.
            if verb in ANSWERED_BY_THE_GUEST and (fate := self._fate()):
                raise fate
            return {"answer": self.requests.answer(line, request)}
        # What a request sees of a machine's end is often only its own connection. The hypervisor knows the cause.
        except MachineDied as error:
            return told(self._fate() or error)
        except Exception as error:
            return told(error)

    def _fate(self) -> MachineError | None:
        """Return the error of a guest that is off or in trouble, or None.

        Channels to it notice that late.
        """
        trouble = self._trouble()
        if trouble is None:
            return None
        state, reason = _ending(trouble)
        what = "is off" if state == OFF else "does not answer any more"
        return MachineError(f"the machine {self._machine.name!r} {what}: {reason}", machine=self._machine.name)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _ending(error: MachineDied) -> tuple[str, str]:
    return (OFF, "the guest powered itself off") if error.exitcode == 0 else (ERROR, _first_line(error))


# -- the process -----------------------------------------------------------------------------------------------------------------------


def _backend(name: str, told: Told, catalog: Catalog, say: Callable[[str], None]) -> Backend:
    # No hook is asked: backends of plugins belong to pytest.
    made = make(name, told, folder=catalog.root, warn=say)
    if made is None:
        raise BackendUnavailable(f"the command line knows no backend {name!r}", "Leave --backend out, or use qemu or smolvm")
    return made


def main() -> None:
    """Run the machine that `Kept.start` asks for.

    Its folder, the lock and the line are given as arguments.
    """
    folder, hold, line = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # The folder that it was started in may be on a file system that the user wants to unmount.
    os.chdir("/")
    os.umask(0o077)
    # Not for its children: a hypervisor with the descriptor would hold the lock beyond the daemon's end.
    os.set_inheritable(hold, False)  # noqa: FBT003 - it has no keyword
    # SIGINT too: whoever sends one means this process, since no terminal can.
    Interruption(left, numbers=(signal.SIGTERM, signal.SIGHUP, signal.SIGINT), owned=True).install()
    sys.exit(keep(Kept(folder), hold, Line(socket.socket(fileno=line))))


def keep(place: Kept, hold: int, line: Line) -> int:
    """Start a machine and keep it to its end; return the exit status of this process.

    Args:
        place: The machine, by its folder.
        hold: The descriptor of that folder, open and locked.
        line: The connection to the client, which sends the order and must stay until the machine is ready.
    """
    # None: the client ended before it sent the order.
    order = line.receive()
    if order is None:
        return 1
    with ExitStack() as stack:
        try:
            with _wanted(line) as confirmed:
                daemon = stack.enter_context(_provided(place, order, lambda words: line.send({"say": words})))
                server = stack.enter_context(listen(hold))
                daemon.listen(server)
                daemon.note()
                # The record is there by now, which the client reads next.
                line.send({"answer": None})
                confirmed.wait()
        except (VMBottleError, OSError) as error:
            # First the machine is ended, so that nothing of it is left when the client reads the error.
            stack.close()
            with suppress(OSError):
                line.send(told(error))
            return 1
        state, reason = _watched(daemon, order.get("seconds"))
        # After the watch and before the machine is removed, whose console and channels answers may need.
        daemon.finish()
        _save_console(place)
    if "seconds" in order:
        # Kept for a while only, and nobody removes it afterwards. What it has said stays.
        for name in (DISK, SNAPSHOTS):
            shutil.rmtree(place.folder / name, ignore_errors=True)
    # Last of all, while the lock is still held: who sees no lock finds the final record.
    place.note(daemon.record.ended(state, reason))
    return 0


def _watched(daemon: Daemon, seconds: float | None) -> tuple[str, str]:
    try:
        return daemon.watch(seconds)
    except SystemExit as error:
        number = int(error.code or 0) - 128
        return STOPPED, f"its daemon was ended by {signal.Signals(number).name}, and the machine with it"


@contextmanager
def _wanted(line: Line) -> Iterator[threading.Event]:
    """Interrupt the block by a signal if the client hangs up.

    Its next message confirms that it has taken the machine.
    """
    confirmed = threading.Event()

    def listen() -> None:
        with suppress(OSError, ValueError):
            if line.receive() is not None:
                confirmed.set()
                return
        # The client may be gone, or have lost patience: then nobody would end this machine.
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    yield confirmed


@contextmanager
def _provided(place: Kept, order: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Daemon]:
    """Yield the running machine with its requests."""
    catalog = Catalog(Path(order["catalog"]))
    told = Told.read(lambda setting: order["settings"].get(setting.name))
    name = told.backend_for(order["keywords"].get("backend", "auto"))
    settings = Settings(
        timeout_factor=told.timeout_factor,
        rebuild_before=time.time() if told.rebuild else None,
        report=say,
        warn=say,
        # From the folder of the client, whose project it is; the daemon works in `/`.
        declared=images.find_declared_images(Path(order["folder"])),
        memory_budget=told.memory_budget,
        retries=told.infra_retries,
        registry=told.registry,
        registry_push=told.registry_push,
        **({"memory_seconds": order["memory_seconds"]} if "memory_seconds" in order else {}),
    )
    provisioner = Provisioner(catalog, _backend(name, told, catalog, say), name=name, settings=settings)
    try:
        made_of = _made_of(place, order, provisioner, catalog)
        # The console is linked within the block of the machine, whose folder is gone after it.
        lans = SharedLans(catalog.root / LANS, {lan: Seat(**seat) for lan, seat in order.get("seats", {}).items()})
        with (
            provisioner.machine(made_of.spec, start=made_of.start, origin=made_of.origin, lans=lans) as machine,
            _shown_console(place, machine),
        ):
            origin = made_of.origin or provisioner.origin(made_of.spec)
            for port, here in forwards(order["keywords"]):
                machine.lifecycle.instance.forward_from(here, port)
            daemon = Daemon(machine, place, _record(place, machine, order), origin)
            if not (made_of.start and made_of.start.kept):
                daemon.requests.keep_disk()
            yield daemon
            _keep_without_file(place, machine, origin)
    finally:
        provisioner.close()
        catalog.close()


@attrs.frozen(kw_only=True)
class _MadeOf:
    """The things that a machine is started with: its spec, and a boot source if it is not that of its spec."""

    spec: MachineSpec
    start: Start | None = None
    origin: Origin | None = None


def _made_of(place: Kept, order: Mapping[str, Any], provisioner: Provisioner, catalog: Catalog) -> _MadeOf:
    keywords = dict(order["keywords"])
    source = str(keywords.pop("source"))
    # Absent for a new machine, a snapshot's label, or empty for the machine's own disk.
    label = order.get("label")
    if label is not None:
        stored = Stored.read(place.folder / (f"{SNAPSHOTS}/{label}" if label else DISK))
        # The whole spec is stored: what was given for the first start alone was made into the disk then.
        given = {} if place.can_start_again else keywords
        return _MadeOf(spec=stored.spec(**{**spec_keywords(given), "name": place.name}), start=stored.start, origin=stored.origin)
    if source.startswith(PACK):
        pack, spec = provisioner.pack_of_key(packs.find(catalog.packs, source.removeprefix(PACK)).name.partition(".")[0])
        given = spec_keywords(keywords)
        spec = spec.but(**{"files": {}, **given, "disks": add_disks(dict(spec.disks), given.get("disks", {}))})
        return _MadeOf(spec=spec, start=provisioner.start(spec, pack))
    return _MadeOf(spec=MachineSpec.resolve(source_of(source, Path(order["folder"])), spec_keywords(keywords)))


def _keep_without_file(place: Kept, machine: Machine, origin: Origin) -> None:
    """Have a backend whose machines have no file of a disk here save the disk at the end, so that the machine can be started again."""
    if machine.lifecycle.instance.overlay is not None:
        return
    folder = place.folder / f".{DISK}"
    with suppress(VMBottleError, OSError):
        folder.mkdir(mode=0o700)
        machine.lifecycle.instance.save(folder, kind=PackKind.DISK, deadline=Deadline(_SHUTDOWN))
        start = Start.own(saved=folder)
        Stored(start=start, origin=KeptOrigin.of(origin), keywords=machine.spec.plain_keywords()).write(place.folder / DISK)
    shutil.rmtree(folder, ignore_errors=True)


def _record(place: Kept, machine: Machine, order: Mapping[str, Any]) -> Record:
    spec = machine.spec
    return Record(
        name=place.name,
        # As it was asked for: a layer's machine is of the layer, and not of its image.
        source=str(order["keywords"].get("source", spec.image)),
        state=RUNNING,
        keeper=Identity.of(os.getpid()),
        spec={name: getattr(spec, name) for name in ("arch", "cpus", "memory", "disk", "network", "user")},
        backend=machine.backend,
        id=machine.id,
        pid=machine.pid,
        ports={str(port): machine.forward(port)[1] for port in spec.ports},
        argv=tuple(getattr(machine.lifecycle.instance, "argv", ())),
        until=time.time() + order["seconds"] if "seconds" in order else None,
    )


@contextmanager
def _shown_console(place: Kept, machine: Machine) -> Iterator[None]:
    """Link the machine's console into its folder.

    `_save_console` replaces the symbolic links by the files themselves at the end.
    """
    for suffix in ("", ".1"):  # a long one is in two files
        path = machine.console.path
        place.console.with_name(place.console.name + suffix).symlink_to(path.with_name(path.name + suffix))
    yield


def _save_console(place: Kept) -> None:
    for link in (place.console, place.console.with_name(f"{place.console.name}.1")):
        try:
            # A rename and no copy: both folders are in the catalog, on one file system.
            link.readlink().replace(link)
        except OSError:  # there is no second one, or no room
            link.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
