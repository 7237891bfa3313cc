"""Commands of smolvm, one function for each.

Its own failures are `SmolvmError`. With `--error-format json` it writes one object as its last line on stderr; the exit status alone would
not tell a failure of its own from a command in a guest that ended with 1.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.backends.smolvm.program import Program
from pytest_vmbottle.errors import MachineTimeout, SmolvmError
from pytest_vmbottle.host import supervisor
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.locks import FileLock

__all__ = ["Creation", "Engine", "Listed", "alone", "failure", "plain"]

log = logging.getLogger(__name__)

# Bounds against a smolvm that hangs, no expectation: slow are the calls that copy a disk or fetch an image, or wait for a guest.
_QUICK = 60.0
_SLOW = 600.0
_LOCKED = "database is locked"
_RUNS_ON, _ENDED = "left the VM alive for retry", "is not running"
"""Messages of `stop` for a machine that did not write its files out within 5 s, and of `exec` for one that has ended."""
# With pauses that double from 0.1 s, some 13 s in all.
_TRIES = 8
_PID = re.compile(r"PID: (\d+)")
_NOTE = b"note: no packed assets found"


@attrs.frozen(kw_only=True)
class Creation:
    """Parameters of a new machine.

    Attributes:
        image: A registry's reference, an archive, or a folder with a root file system; empty for smolvm's own Alpine.
        packed: A file that `pack` or `checkpoint` wrote, instead of an image.
        cpus: Virtual processors.
        memory: Bytes of RAM.
        network: Whether it reaches the network, or the only networks that it reaches (CIDR).
        ports: Host ports by guest port.
        label: Name of the process that made it.
        disk: Bytes of the disk for changes of its root file system; 0 for smolvm's own size.
        nested: Whether it can run virtual machines itself.
    """

    image: str = ""
    packed: Path | None = None
    cpus: int = 1
    memory: int = 1 << 30
    network: bool | tuple[str, ...] = False
    ports: Mapping[int, int] = attrs.field(factory=dict)
    label: str = ""
    disk: int = 0
    nested: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The command-line options for these parameters."""
        # Without --net, smolvm before 1.0 left the network off whatever was allowed; it is said whenever there is to be one.
        network = ("--net", *(word for cidr in _networks(self.network) for word in ("--allow-cidr", cidr))) if self.network else ()
        return (
            *(("--from", str(self.packed)) if self.packed is not None else ()),
            *(("--image", self.image) if self.image else ()),
            # Always given: smolvm's defaults are 4 processors and 8 GiB.
            *("--cpus", str(self.cpus), "--mem", str(max(1, self.memory >> 20))),
            # In whole GiB, rounded up.
            *(("--overlay", str(-(-self.disk >> 30))) if self.disk else ()),
            *(("--nested",) if self.nested else ()),
            *network,
            *(word for guest, host in self.ports.items() for word in ("--port", f"{host}:{guest}")),
            *(("--label", f"{LABEL}={self.label}") if self.label else ()),
        )


LABEL = "vmbottle-owner"


def _networks(network: bool | tuple[str, ...]) -> tuple[str, ...]:  # noqa: FBT001 - as a spec says it
    return network if isinstance(network, tuple) else ()


@attrs.frozen(kw_only=True)
class Listed:
    """A machine as `machine ls` lists it.

    Attributes:
        name: Its name.
        state: `"created"`, `"running"`, `"stopped"`, or another word of smolvm's.
        pid: The process that runs it; of no meaning unless it is running.
        labels: Its labels.
    """

    name: str
    state: str
    pid: int | None
    labels: Mapping[str, str]


class Engine:
    """A smolvm with the folder of its machines."""

    def __init__(self, program: Program, state: Path | None, *, rundir: Path | None = None) -> None:
        """Make the folder, by default smolvm's own; run nothing.

        Args:
            program: The program.
            state: Its folder.
            rundir: The machine's folder; every process that is started is marked with it, which proves whose it is.
        """
        self.program = program
        self.state = state and private_dir(state)
        self._environment = supervisor.environment(rundir) if rundir is not None else None

    def of(self, rundir: Path) -> Engine:
        """Return the same engine for the machine of another folder."""
        return Engine(self.program, self.state, rundir=rundir)

    # -- machines --------------------------------------------------------------------------------------------------------------------

    def create(self, name: str, creation: Creation, *, deadline: Deadline | None = None) -> None:
        """Make a machine; it does not run yet."""
        with self._alone(deadline):
            self._do("machine", "create", "--name", name, *creation.words, seconds=_SLOW, deadline=deadline)

    def start(self, name: str, *, branchable: bool = False, deadline: Deadline | None = None) -> int:
        """Start a machine; return the ID of the process that runs it."""
        with self._alone(deadline):
            words = ("--branchable",) if branchable else ()
            said = self._do("machine", "start", "--name", name, *words, seconds=_SLOW, deadline=deadline)
        found = _PID.search(said)
        # The message is for people and may change with a version; the list is for programs, but takes another run of smolvm.
        pid = int(found[1]) if found else self._listed(name).pid
        if pid is None:
            raise MachineTimeout(f"smolvm started the machine {name} but did not report its process id", machine=name)
        return pid

    def stop(self, name: str, *, deadline: Deadline | None = None) -> None:
        """Have a machine write its files out and shut down, however long that takes.

        A machine that does not run stays as it is.
        """
        try:
            self._do("machine", "stop", "--name", name, seconds=_SLOW, deadline=deadline)
        except SmolvmError as error:
            if _RUNS_ON not in error.stderr:
                raise
            self._await_sync(name, deadline)
            self._do("machine", "stop", "--name", name, seconds=_SLOW, deadline=deadline)

    def _await_sync(self, name: str, deadline: Deadline | None) -> None:
        """Wait until a guest's files are written out.

        A machine that is stopped while it does not answer is cut off, and loses what is not written.
        """
        try:
            self._do("machine", "exec", "--name", name, "--", "sync", seconds=_SLOW, deadline=deadline)
        except SmolvmError as error:
            if _ENDED not in error.stderr:  # if it has, it did at last what it had been asked
                raise

    def delete(self, name: str, *, deadline: Deadline | None = None) -> bool:
        """Remove a machine, running or not; return whether there was one."""
        try:
            self._do("machine", "delete", "-f", "--name", name, seconds=_SLOW, deadline=deadline)
        except SmolvmError as error:
            if error.code == "NOT_FOUND":
                return False
            raise
        return True

    def machines(self) -> tuple[Listed, ...]:
        """Return all machines of this folder."""
        answer = json.loads(self._do("machine", "ls", "--json", seconds=_QUICK))
        return tuple(
            Listed(name=each["name"], state=each["state"], pid=each.get("pid"), labels=each.get("labels") or {}) for each in answer
        )

    def _listed(self, name: str) -> Listed:
        found = next((each for each in self.machines() if each.name == name), None)
        return found or Listed(name=name, state="unknown", pid=None, labels={})

    def status(self, name: str) -> str:
        """Return smolvm's status of a machine, for people."""
        return self._do("machine", "status", "--name", name, seconds=_QUICK)

    def data_dir(self, name: str) -> Path:
        """Return the folder of a machine's files."""
        return Path(self._do("machine", "data-dir", "--name", name, seconds=_QUICK).strip())

    def copy_in(self, name: str, source: Path, path: str, *, deadline: Deadline | None = None) -> None:
        """Copy a host file to a path in the guest."""
        self._do("machine", "cp", str(source.absolute()), f"{name}:{path}", seconds=_SLOW, deadline=deadline)

    def copy_out(self, name: str, path: str, target: Path, *, deadline: Deadline | None = None) -> None:
        """Copy a file of the guest to the host."""
        self._do("machine", "cp", f"{name}:{path}", str(target.absolute()), seconds=_SLOW, deadline=deadline)

    def exec_argv(self, name: str, command: Sequence[str], *, terminal: bool = False) -> list[str]:
        """Return the command line that runs a command in a guest and streams its output."""
        # Without -i the output comes whole at the end, and none of it where the command is ended before.
        return self._argv("machine", "exec", "--name", name, "-i", *(("-t",) if terminal else ()), "--", *command)

    # -- what machines are made from -------------------------------------------------------------------------------------------------

    def branch(
        self, source: str, name: str, *, ports: Mapping[int, int] | None = None, label: str = "", deadline: Deadline | None = None
    ) -> int:
        """Branch a new machine from a running, branchable one; return the ID of its process."""
        label_words = ("--label", f"{LABEL}={label}") if label else ()
        port_words = [word for guest, host in (ports or {}).items() for word in ("--port", f"{host}:{guest}")]
        with self._alone(deadline):
            words = ("--from", source, "--name", name, "--freeze-source", *port_words, *label_words)
            self._do("machine", "branch", *words, seconds=_SLOW, deadline=deadline)
        pid = self._listed(name).pid
        if pid is None:
            raise MachineTimeout(f"smolvm branched the machine {name} but did not report its process id", machine=name)
        return pid

    def checkpoint(self, name: str, dest: Path, *, deadline: Deadline | None = None) -> None:
        """Write a running, branchable machine with its RAM into a file; the machine continues."""
        self._do("machine", "checkpoint", "--name", name, "--output", str(dest), seconds=_SLOW, deadline=deadline)

    def pack(self, dest: Path, *, machine: str = "", image: str = "", deadline: Deadline | None = None) -> Path:
        """Pack a stopped machine or an image; return the file for `Creation.packed`.

        It is `dest` with `.smolmachine` at its end.

        Raises:
            SmolvmError: smolvm failed, for example because the machine is running.
        """
        # /workspace lies on another disk, which a pack has only if it is asked for.
        source = ("--from-vm", machine, "--include-workspace") if machine else ("--image", image)
        self._do("pack", "create", *source, "--output", str(dest), seconds=_SLOW, deadline=deadline)
        dest.unlink(missing_ok=True)  # a program that would run it, 50 MB, of which nothing is needed
        return dest.with_name(f"{dest.name}.smolmachine")

    # -- how it is asked -------------------------------------------------------------------------------------------------------------

    def _argv(self, group: str, verb: str, *words: str) -> list[str]:
        state = () if self.state is None else ("--state-dir", str(self.state))
        return [str(self.program.path), group, verb, "--error-format", "json", *state, *words]

    def _do(self, group: str, verb: str, *words: str, seconds: float, deadline: Deadline | None = None) -> str:
        """Run a subcommand, again if the database was locked; return its stdout."""
        limit = Deadline(min(seconds, deadline.remaining) if deadline is not None else seconds)
        argv = self._argv(group, verb, *words)
        for attempt in range(1, _TRIES + 1):
            try:
                return _run(argv, limit, self._environment)
            except SmolvmError as error:
                if _LOCKED not in error.stderr or attempt == _TRIES or limit.expired:
                    raise
                log.info("smolvm's database was locked, attempt %d of %d", attempt, _TRIES)
                # Random pauses, or processes that collided once would collide again.
                time.sleep(min(limit.remaining, 0.05 * 2**attempt * random.uniform(0.5, 1.5)))  # noqa: S311 - no secret
        raise AssertionError("unreachable")

    @contextmanager
    def _alone(self, deadline: Deadline | None) -> Iterator[None]:
        """Lock smolvm for one process at a time: its database fails when many make or start machines at once."""
        # In or beside the state folder, so that exactly those who use the same database wait for each other.
        folder = self.state or private_dir(Path.home() / ".cache")
        with alone(folder / "vmbottle.lock", deadline or Deadline(_SLOW)):
            yield


@contextmanager
def alone(path: Path, deadline: Deadline) -> Iterator[None]:
    """Lock a path for one process at a time.

    Raises:
        MachineTimeout: Others held it until the deadline.
    """
    lock = FileLock(path)
    try:
        if not lock.acquire(deadline):
            raise MachineTimeout(f"timed out after {deadline.seconds:.0f} s waiting for other processes that use smolvm ({path})")
        yield
    finally:
        lock.release()


def _run(argv: Sequence[str], deadline: Deadline, environment: Mapping[str, str] | None) -> str:
    process = subprocess.Popen(  # noqa: S603 - argv list, no shell
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # Not one process group with us: a Ctrl-C would cut smolvm off in the middle of a change to its database.
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=deadline.remaining)
    except subprocess.TimeoutExpired as expired:
        _kill(process)
        raise failure(argv, None, expired.stderr or b"") from None
    except BaseException:
        _kill(process)
        raise
    if process.returncode:
        raise failure(argv, process.returncode, stderr)
    return stdout.decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # Something may have left the group and hold the pipes open.
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=2)


def plain(stderr: bytes) -> bytes:
    """Return stderr without the note that smolvm begins with when it runs under another name."""
    if not stderr.startswith(_NOTE):
        return stderr
    return stderr.partition(b"\n")[2]


def failure(argv: Sequence[str], returncode: int | None, stderr: bytes) -> SmolvmError:
    """Return the error for a failed smolvm."""
    text = plain(stderr).decode(errors="replace").strip()
    told = _told(text)
    what = " ".join(argv[1:3])
    message = str(told.get("message") or text or "no output")
    if returncode is None:
        message = f"timed out and was ended; its output until then: {message}"
    return SmolvmError(f"smolvm {what}: {message}", argv=argv, returncode=returncode, stderr=text, code=str(told.get("code", "")))


def _told(text: str) -> dict[str, Any]:
    """Return the facts in the last line of a failure."""
    with suppress(ValueError, IndexError):
        last = json.loads(text.splitlines()[-1])
        # What crashed leaves no such object: then its whole text is the message.
        told = last.get("error") if isinstance(last, dict) else None
        return told if isinstance(told, dict) else {}
    return {}
