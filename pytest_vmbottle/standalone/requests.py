"""Requests of other processes for a running machine: the verbs of `Machine`, by a line."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import attrs

from pytest_vmbottle.errors import CatalogError, MachineDied, MachineError, VMBottleError
from pytest_vmbottle.guest.path import raise_for
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import descriptor
from pytest_vmbottle.machine.machine import Machine
from pytest_vmbottle.result import CommandTimeout
from pytest_vmbottle.standalone import terminal
from pytest_vmbottle.standalone.client import DISK, LABEL, SNAPSHOTS, Kept
from pytest_vmbottle.standalone.line import Line
from pytest_vmbottle.standalone.stored import Stored
from pytest_vmbottle.standalone.streams import connect

if TYPE_CHECKING:
    from pytest_vmbottle.guest.path import GuestPath
    from pytest_vmbottle.provision.origins import Origin

__all__ = ["ANSWERED_BY_THE_GUEST", "Requests", "told"]

ANSWERED_BY_THE_GUEST = frozenset(
    ("archive", "cp", "exec", "freeze", "journal", "list", "metrics", "mkdir", "read", "reboot", "search", "snapshot", "ssh")
) | {"ssh-config", "terminal", "upload", "write"}
"""Verbs that a guest which is off or in trouble cannot answer."""
_LOGIN = 60.0
"""Seconds for the first terminal: without KVM the guest's part of the key exchange takes several."""
_READ = 'exec cat -- "$1"'
_PLACED = ".vmbottle-"
# Everything lies in the guest before the first file gets its final name, so a full disk or a lost connection changes nothing.
_PUT = """
set -e
staged=$1 dest=$2 clean=$3
trap 'rm -rf -- "$staged"' EXIT
[ "$clean" = "" ] || [ ! -e "$dest" ] || find "$dest" -xdev -mindepth 1 -delete
mkdir -p -- "$dest"
cp -a -- "$staged/." "$dest/"
"""


class Requests:
    """The verbs that a daemon answers.

    Each takes the line of the request, whose descriptors it may use, and the request.

    Attributes:
        replacing: Lock that is held while the machine's hypervisor is replaced.
    """

    def __init__(self, machine: Machine, place: Kept, origin: Origin, *, note: Callable[..., None]) -> None:
        """Take a machine that is ready.

        Args:
            machine: The machine.
            place: Its folder.
            origin: The image at its bottom.
            note: Function that writes changed fields of its record.
        """
        self._machine, self._place, self._origin, self._note = machine, place, origin, note
        self.replacing = threading.Lock()
        self._has_logged_in = False
        self._verbs: dict[str, Callable[[Line, Mapping[str, Any]], Any]] = {
            "archive": self._archive,
            "cp": self._cp,
            "exec": self._exec,
            "forward": self._forward,
            "freeze": lambda *_: str(machine.lifecycle.snapshot("frozen", whole=True).path),
            "journal": lambda _, request: machine.journal(request.get("unit"), since=request.get("since"), lines=request.get("lines")),
            "keys": lambda _, request: machine.send_keys(*request["keys"]),
            "gdb": lambda *_: str(machine.gdb()),
            "list": self._list,
            "metrics": self._metrics,
            "mkdir": self._mkdir,
            "pause": self._pause,
            "plug-disk": lambda _, request: machine.plug_disk(request["disk"], request["source"]),
            "qmp": lambda _, request: machine.qmp(request["command"], request["arguments"]),
            "read": self._read,
            "reboot": lambda *_: machine.reboot(),
            "restore": self._restore,
            "resume": self._resume,
            "screenshot": self._screenshot,
            "search": self._search,
            "send-console": lambda _, request: machine.send_console(request["text"]),
            "snapshot": self._snapshot,
            "ssh": self._ssh,
            "ssh-config": lambda *_: str(machine.ssh_config()),
            "terminal": self._terminal,
            "text": lambda _, request: machine.screen_text() if request["tty"] is None else machine.tty_text(request["tty"]),
            "type": lambda _, request: machine.send_keys(*request["text"]),
            "unplug-disk": lambda _, request: machine.unplug_disk(request["disk"]),
            "upload": self._upload,
            "write": self._write,
        }

    def answer(self, line: Line, request: Mapping[str, Any]) -> Any:
        """Return the answer to a request.

        Raises:
            ValueError: There is no such verb.
        """
        verb = self._verbs.get(str(request.get("verb")))
        if verb is None:
            raise ValueError(f"there is no verb {request.get('verb')!r}; there are {', '.join(sorted(self._verbs))}")
        return verb(line, request)

    # -- commands --------------------------------------------------------------------------------------------------------------------

    def _exec(self, line: Line, request: Mapping[str, Any]) -> int:
        """Run a command with the three descriptors that came with the request, and return its status."""
        words, timeout = tuple(request["argv"]), request["timeout"]
        self._log_in()
        # The descriptors stay open until the line is closed, after the answer.
        with connect(self._machine, words, line.descriptors, env=request["env"], cwd=request["cwd"], user=request["user"]) as piped:
            deadline = None if timeout is None else Deadline(timeout)
            return piped.wait(cancelled=lambda: line.is_cut, deadline=deadline)

    def _log_in(self) -> None:
        """Have the channel for streams made meanwhile, once, if there is none: the first command does not wait for it."""

        def attempt() -> None:
            with suppress(MachineError):
                self._machine.lifecycle.stream_channel(Deadline(_LOGIN))

        if not self._has_logged_in:
            self._has_logged_in = True
            threading.Thread(target=attempt, daemon=True, name="login").start()

    def _terminal(self, line: Line, request: Mapping[str, Any]) -> int | None:
        """Connect a terminal in the guest to the descriptor that came with the request, and return the status of what ran on it."""
        columns, lines = request["size"]
        user, argv = request["user"] or self._machine.spec.user, tuple(request["argv"])
        command = None
        if argv:
            env = {"TERM": request["kind"], **request["env"]}
            command = self._machine.guest.command(argv, env=env, cwd=request["cwd"], user=request["user"])
        deadline = Deadline(_LOGIN)
        channel = self._machine.lifecycle.stream_channel(deadline, terminals=True)
        opened = channel.terminal(user=user, kind=request["kind"], size=(columns, lines), deadline=deadline, command=command)
        with closing(opened) as session:
            # The first of two answers: the terminal is open.
            line.send({"answer": None})
            return terminal.serve(session, line)

    # -- files -----------------------------------------------------------------------------------------------------------------------

    def _path(self, text: str) -> GuestPath:
        if not text.startswith("/"):
            raise ValueError(f"{text!r}: a path in the guest begins with a slash")
        return self._machine.path(text)

    def _cp(self, _: Line, request: Mapping[str, Any]) -> None:
        source, target = request["src"], request["dst"]
        if request["to_guest"]:
            self._machine.cp(Path(source), self._path(target))
        else:
            self._machine.cp(self._path(source), Path(target))

    def _read(self, line: Line, request: Mapping[str, Any]) -> None:
        path = self._path(request["path"])
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        with self._scratch() as folder, (folder / "read").open("w+b") as file:
            # The content alone, and no copy of the file: a copy of a symbolic link would be a link to a file of this computer.
            raise_for(self._machine.guest.fetch(_READ, str(path), sink=file, size=found.st_size), path)
            file.seek(0)
            _pass_on(file, line)

    def _write(self, line: Line, request: Mapping[str, Any]) -> int:
        with self._scratch() as folder:
            file = folder / "write"
            with open(line.descriptors[0], "rb", closefd=False) as source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            content = file if request.get("mode") is None else (file, request["mode"])
            self._machine.write_files({str(self._path(request["path"])): content}, owner=request.get("owner"))
            return file.stat().st_size

    def _archive(self, line: Line, request: Mapping[str, Any]) -> None:
        with self._scratch() as folder:
            _send(self._machine.archive(self._path(request["root"]), folder / "archive", request["format"]), line)

    def _upload(self, _: Line, request: Mapping[str, Any]) -> None:
        dest = self._path(request["dest"])
        if dest.parent == dest:
            raise ValueError("files cannot be uploaded into the root folder: name a folder in it")
        staged = dest.parent / f"{_PLACED}{os.urandom(8).hex()}"
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._machine.cp(Path(request["src"]), staged)
            put = self._machine.exec(["sh", "-c", _PUT, "sh", str(staged), str(dest), "clean" if request.get("clean") else ""], check=False)
            if not put.ok:
                raise OSError(errno.EIO, put.stderr.strip() or "the files could not be put into their folder", str(dest))
        finally:
            staged.rmtree(missing_ok=True)

    def _mkdir(self, _: Line, request: Mapping[str, Any]) -> None:
        for path in request["paths"]:
            self._path(path).mkdir(parents=request.get("parents", True), exist_ok=True)

    def _list(self, _: Line, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        entries = [entry for path in request["paths"] for entry in self._path(path).scan(depth=request.get("depth", 1))]
        facts = ("name", "type", "size", "mode", "mtime")
        return [{"path": str(entry.path), **{fact: getattr(entry, fact) for fact in facts}} for entry in entries]

    def _search(self, _: Line, request: Mapping[str, Any]) -> dict[str, Any]:
        how = {key: value for key, value in request.items() if key not in ("verb", "pattern", "root")}
        found = self._machine.search(request["pattern"], self._path(request["root"]), **how)
        return {"matches": [attrs.asdict(match) for match in found], "truncated": found.truncated, "timed_out": found.timed_out}

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        # In the machine's folder, on the catalog's file system: what is copied may be larger than the RAM behind /tmp.
        with tempfile.TemporaryDirectory(dir=self._place.folder, prefix=".copy-") as folder:
            yield Path(folder)

    # -- power and time --------------------------------------------------------------------------------------------------------------

    def _pause(self, *_: object) -> None:
        self._machine.pause()
        self._note(state="paused")

    def _resume(self, *_: object) -> None:
        self._machine.resume()
        self._note(state="running")

    def _snapshot(self, _: Line, request: Mapping[str, Any]) -> None:
        label = _label(request)
        folder = self._place.folder / SNAPSHOTS / label
        if folder.exists():
            raise CatalogError(f"the machine {self._machine.name!r} has a snapshot {label!r} already: remove it, or choose another label")
        snapshot = self._machine.snapshot(label)
        try:
            Stored.of(snapshot, self._origin, label).write(folder)
        finally:
            # Its files have second names by now.
            shutil.rmtree(snapshot.path, ignore_errors=True)

    def _restore(self, _: Line, request: Mapping[str, Any]) -> None:
        stored = Stored.read(self._place.snapshot_folder(_label(request)))
        with self.replacing:
            self._machine.restore(stored.snapshot())
        self.keep_disk()
        self._note(state="running")

    def keep_disk(self) -> None:
        """Give the machine's own disk a place from which it can be started again, if the backend has a file of it.

        Raises:
            OSError: There is no room.
        """
        stored = Stored.disk_of(self._machine, self._origin)
        if stored is not None:
            stored.write(self._place.folder / DISK)

    # -- what others need ------------------------------------------------------------------------------------------------------------

    def _screenshot(self, line: Line, _: Mapping[str, Any]) -> None:
        with self._scratch() as folder:
            _send(self._machine.screenshot(folder / "screen.png"), line)

    def _forward(self, _: Line, request: Mapping[str, Any]) -> tuple[str, int]:
        host, port = self._machine.forward(request["port"])
        self._note(ports={request["port"]: port})
        return host, port

    def _metrics(self, line: Line, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the machine's figures, with processor time over the last moment."""
        # Processor time is a difference: this sample is its beginning.
        self._machine.metrics()
        Deadline(request["seconds"]).poll(lambda: line.is_cut)
        return self._machine.metrics().figures

    def _ssh(self, *_: object) -> dict[str, Any]:
        """Return address, user and keys for a login."""
        access = self._machine.lifecycle.instance.ssh_access()
        return {"address": access.address, "keys": attrs.asdict(access.keys), "user": self._machine.spec.user}


def _label(request: Mapping[str, Any]) -> str:
    label = str(request["label"])
    if not LABEL.fullmatch(label):
        raise ValueError(f"label={label!r}: takes letters, digits, and -_. after the first, at most 61 in all")
    return label


def _send(file: Path, line: Line) -> None:
    """Write a file that this process has made to the descriptor that came with a request."""
    with descriptor(file, os.O_RDONLY) as fd, open(fd, "rb", closefd=False) as source:
        _pass_on(source, line)


def _pass_on(source: BinaryIO, line: Line) -> None:
    with open(line.descriptors[0], "wb", closefd=False) as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def told(error: Exception) -> dict[str, Any]:
    """Encode an error for another process."""
    message: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    if isinstance(error, CommandTimeout):
        return message | {"argv": error.result.argv, "seconds": error.timeout}
    if isinstance(error, MachineDied):
        return message | {"error": "MachineError"}
    if isinstance(error, VMBottleError):
        # By the nearest kind that a client knows: subclasses are told as what they are.
        return message | {"kinds": [kind.__name__ for kind in type(error).__mro__]}
    if isinstance(error, OSError):
        return message | {"message": error.strerror or str(error), "errno": error.errno or 0, "filename": error.filename}
    # A mistake of ours: its traceback is for the log, and the client gets a sentence.
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
        message["message"] = f"{type(error).__name__}: {error} (see keeper.log, the log of the machine's daemon)"
    return message
