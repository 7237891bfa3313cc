"""The daemon of one machine without pytest, behind `vmbottle machine start`.

A machine ends with the process that started it, and only that process holds its monitor and its agent. So this one stays, detached from the
terminal, and serves requests of other processes by its socket, to which only this user can connect.
"""

from __future__ import annotations

import base64
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle import images
from pytest_vmbottle.backends.make import make
from pytest_vmbottle.backends.port import Backend, Start
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.errors import BackendUnavailable, MachineDied, MachineError, Unsupported, VMBottleError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.signals import Interruption, left
from pytest_vmbottle.host.supervisor import Identity
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.machine.snapshot import Snapshot
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.settings import Settings as Told
from pytest_vmbottle.shown import printable
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.standalone import client as kept
from pytest_vmbottle.standalone.client import Kept, Line, Record
from pytest_vmbottle.standalone.streams import connect

__all__ = ["Daemon", "keep", "main"]

_PACE = 0.5
"""Seconds between two checks whether the machine has ended."""
# Seconds in which a client must have sent its request, and a guest must take the command to power off.
_PATIENCE = 10.0
_SHUTDOWN = 90.0
"""Seconds that a guest may take to power off."""
_LAST_WORDS = 3.0
"""Seconds in which pending requests get their answers after the machine has ended."""
_ANSWERED_BY_THE_GUEST = frozenset({"exec", "cp", "ssh", "freeze"})
# For backends without an orderly shutdown. It sleeps first, so that the command is answered before the guest goes down.
_SNAPSHOT = "snapshot"
"""Folder in a machine's folder for the snapshot that it was started from."""
_POWER_OFF = "(sleep 0.2; poweroff) >/dev/null 2>&1 </dev/null &"


def _backend(name: str, told: Told, catalog: Catalog, say: Callable[[str], None]) -> Backend:
    # No hook is asked: backends of plugins belong to pytest.
    made = make(name, told, folder=catalog.root, warn=say)
    if made is None:
        raise BackendUnavailable(f"the command line knows no backend {name!r}", "Leave --backend out, or use qemu or smolvm")
    return made


class Daemon:
    """A running machine, and the requests of other processes for it."""

    def __init__(self, machine: Machine) -> None:
        """Take a machine that is ready."""
        self._machine = machine
        # Written by request threads and read by the main thread: an assignment is whole, and `_woken` tells of it.
        self._wish = ""
        self._woken = threading.Event()
        self._busy: set[threading.Thread] = set()
        self._verbs: dict[str, Callable[[Line, Mapping[str, Any]], Any]] = {
            "exec": self._exec,
            "cp": self._cp,
            "metrics": self._metrics,
            "ssh": self._ssh,
            "ssh-config": lambda *_: str(machine.ssh_config()),
            # It only wakes the main thread, which ends the machine: the answer must come before the end.
            "stop": self._stop,
            "freeze": lambda *_: str(machine.snapshot("frozen").path),
        }

    # -- its end ---------------------------------------------------------------------------------------------------------------------

    def watch(self, note: Callable[[str, str], object], seconds: float | None = None) -> tuple[str, str]:
        """Wait until the machine ends or is to be stopped; return its last state and the reason.

        Args:
            note: Function that is called at once with an end that nobody asked for, and once with the trouble of a machine that still runs.
            seconds: Seconds after which it is ended, if nobody asked for that before.
        """
        told = False
        # Wall-clock time, which goes on while this computer sleeps.
        until = None if seconds is None else time.time() + seconds
        while not self._woken.wait(_PACE):
            if until is not None and time.time() >= until:
                return "stopped", f"it was ended after {seconds:.0f} s, as its test asked"
            trouble = self._trouble()
            if trouble is None:
                continue
            if not told or trouble.exitcode is not None:
                note(*_ending(trouble))
                told = True
            if trouble.exitcode is not None:
                return _ending(trouble)
        return "stopped", self._power_off()

    def _trouble(self) -> MachineDied | None:
        try:
            self._machine.lifecycle.instance.alive()
        except MachineDied as error:
            return error
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

    def _stop(self, _: Line, request: Mapping[str, Any]) -> None:
        self._wish = "cut" if request["now"] else self._wish or "off"
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
            if kept.peer_is_us(sock):
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
        verb = request["verb"]
        try:
            # A channel notices the end of a machine late, so the hypervisor is asked first.
            if verb in _ANSWERED_BY_THE_GUEST and (fate := self._fate()):
                raise fate
            return {"answer": self._verbs[verb](line, request)}
        # What a request sees of a machine's end is often only its own connection. The hypervisor knows the cause.
        except MachineDied as error:
            return _told(self._fate() or error)
        except Exception as error:
            return _told(error)

    def _fate(self) -> MachineError | None:
        """Return the error of a guest that is off or in trouble, or None.

        Channels to it notice that late.
        """
        trouble = self._trouble()
        if trouble is None:
            return None
        state, reason = _ending(trouble)
        what = "is off" if state == "off" else "does not answer any more"
        return MachineError(f"the machine {self._machine.name!r} {what}: {reason}", machine=self._machine.name)

    def _exec(self, line: Line, request: Mapping[str, Any]) -> int:
        """Run a command with the three descriptors that came with the request, and return its status."""
        words, timeout = tuple(request["argv"]), request["timeout"]
        # The descriptors stay open until the line is closed, after the answer.
        with connect(self._machine, words, line.descriptors, env=request["env"], cwd=request["cwd"], user=request["user"]) as piped:
            deadline = None if timeout is None else Deadline(timeout)
            return piped.wait(cancelled=lambda: line.is_cut, deadline=deadline)

    def _cp(self, _: Line, request: Mapping[str, Any]) -> None:
        source, target = request["src"], request["dst"]
        if request["to_guest"]:
            self._machine.cp(Path(source), self._machine.path(target))
        else:
            self._machine.cp(self._machine.path(source), Path(target))

    def _metrics(self, line: Line, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the machine's figures, with processor time over the last moment."""
        # Processor time is a difference: this sample is its beginning.
        self._machine.metrics()
        Deadline(request["seconds"]).poll(lambda: line.is_cut)
        return self._machine.metrics().figures

    def _ssh(self, _: Line, __: Mapping[str, Any]) -> dict[str, Any]:
        """Return address, user and keys for a login."""
        access = self._machine.lifecycle.instance.ssh_access()
        return {"address": access.address, "keys": attrs.asdict(access.keys), "user": self._machine.spec.user}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _ending(error: MachineDied) -> tuple[str, str]:
    return ("off", "the guest powered itself off") if error.exitcode == 0 else ("error", _first_line(error))


def _told(error: Exception) -> dict[str, Any]:
    """Encode an error for another process."""
    message: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, CommandTimeout):
        return message | {"argv": error.result.argv, "seconds": error.timeout}
    if isinstance(error, VMBottleError):
        return message
    if isinstance(error, OSError):
        parts = (error.filename, error.strerror or error)
        return message | {"message": ": ".join(str(part) for part in parts if part)}
    # A mistake of ours: its traceback is for the log, and the client gets a sentence.
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
        message["message"] = f"{type(error).__name__}: {error} (see keeper.log, the log of the machine's daemon)"
    return message


# -- the process -----------------------------------------------------------------------------------------------------------------------


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
                machine, record = stack.enter_context(_provided(place, order, lambda words: line.send({"say": words})))
                keeper = Daemon(machine)
                server = stack.enter_context(kept.listen(hold))
                keeper.listen(server)
                place.note(record)
                # The record is there by now, which the client reads next.
                line.send({"answer": None})
                confirmed.wait()
        except (VMBottleError, OSError) as error:
            # First the machine is ended, so that nothing of it is left when the client reads the error.
            stack.close()
            with suppress(OSError):
                line.send(_told(error))
            return 1
        state, reason = _watched(keeper, place, record, order.get("seconds"))
        # After the watch and before the machine is removed, whose console and channels answers may need.
        keeper.finish()
        _save_console(place)
    shutil.rmtree(place.folder / _SNAPSHOT, ignore_errors=True)
    # Last of all, while the lock is still held: who sees no lock finds the final record.
    place.note(attrs.evolve(record, state=state, reason=reason, since=time.time(), ports={}, pid=None))
    return 0


def _watched(keeper: Daemon, place: Kept, record: Record, seconds: float | None) -> tuple[str, str]:
    try:
        return keeper.watch(lambda state, reason: place.note(attrs.evolve(record, state=state, reason=reason, since=time.time())), seconds)
    except SystemExit as error:
        number = int(error.code or 0) - 128
        return "stopped", f"its daemon was ended by {signal.Signals(number).name}, and the machine with it"


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
def _provided(place: Kept, order: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[tuple[Machine, Record]]:
    """Yield the running machine and its record."""
    spec, start = _described(place, order)
    catalog = Catalog(Path(order["catalog"]))
    told = Told.read(lambda setting: order["settings"].get(setting.name))
    name = told.backend_for(spec.backend)
    settings = Settings(
        timeout_factor=told.timeout_factor,
        rebuild_before=time.time() if told.rebuild else None,
        report=say,
        warn=say,
        # From the folder of the client, whose project it is; the daemon works in `/`.
        declared=images.find_declared_images(Path(order["folder"])),
        memory_budget=told.memory_budget,
        retries=told.infra_retries,
        **({"memory_seconds": order["memory_seconds"]} if "memory_seconds" in order else {}),
    )
    provisioner = Provisioner(catalog, _backend(name, told, catalog, say), name=name, settings=settings)
    try:
        # The console is linked within the block of the machine, whose folder is gone after it.
        with provisioner.machine(spec, start=start) as machine, _shown_console(place, machine):
            yield machine, attrs.evolve(_record(place, machine), until=time.time() + order["seconds"] if "seconds" in order else None)
    finally:
        provisioner.close()
        catalog.close()


def _described(place: Kept, order: Mapping[str, Any]) -> tuple[MachineSpec, Start | None]:
    """Return what machine to start, and from what if it is not from its source."""
    keywords = dict(order["keywords"])
    if "snapshot" not in order:
        return MachineSpec.resolve(_source(keywords.pop("source")), keywords), None
    # Trusted, because it comes by the line from the process that started this one.
    snapshot: Snapshot = pickle.loads(base64.b64decode(order["snapshot"]))  # noqa: S301
    del keywords["source"]  # for people
    return snapshot.of(**keywords), _own(snapshot, private_dir(place.folder / _SNAPSHOT))


def _own(snapshot: Snapshot, folder: Path) -> Start:
    """Return a snapshot as a boot source whose files this machine has itself.

    The machine that it was made of ends with its test, and its folder with the run. So the files get a second name, which costs no room.
    """
    start, seed = snapshot.start, folder / "boot-seed"
    for path in snapshot.path.iterdir():
        os.link(path, folder / path.name)
    # Not every backend has one.
    if start.seed.exists():
        os.link(start.seed, seed)
    own = (attrs.evolve(disk, path=folder / disk.path.name) if disk.path.parent == snapshot.path else disk for disk in start.disks)
    return attrs.evolve(start, saved=folder, seed=seed, disks=tuple(own))


def _source(text: str) -> str | Path:
    return Path(text) if "/" in text else text


def _record(place: Kept, machine: Machine) -> Record:
    spec = machine.spec
    return Record(
        name=place.name,
        source=str(spec.image),
        state="running",
        keeper=Identity.of(os.getpid()),
        spec={name: getattr(spec, name) for name in ("arch", "cpus", "memory", "disk", "network", "user")},
        backend=machine.backend,
        id=machine.id,
        pid=machine.pid,
        ports={str(port): machine.forward(port)[1] for port in spec.ports},
        argv=tuple(getattr(machine.lifecycle.instance, "argv", ())),
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
