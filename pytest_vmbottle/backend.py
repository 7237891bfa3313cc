"""The ports: what a hypervisor must offer (`Backend`, `Instance`, `Channel`), and the values that pass through them."""

from __future__ import annotations

import secrets
import socket
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import attrs

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.result import printable, tail
from pytest_vmbottle.spec import MachineSpec

__all__ = [
    "GUEST_MAC",
    "GUEST_PATH",
    "MAX_OUTPUT",
    "Backend",
    "Cabling",
    "Capabilities",
    "Channel",
    "Command",
    "Console",
    "Disk",
    "Finished",
    "Forwarding",
    "Instance",
    "Keys",
    "PackKind",
    "Start",
    "Unwakeable",
    "not_run",
]

MAX_OUTPUT = 16 << 20
"""Bytes of each stream of a command that are kept; the QEMU guest agent has the same limit (GUEST_EXEC_MAX_OUTPUT in qga/commands.c)."""


GUEST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked up in a guest."""

GUEST_MAC = "52:54:00:12:34:56"
"""The address of the network card by which a guest is reached from the host; each machine has a network of its own."""


class PackKind(StrEnum):
    """What a pack restores, quickest first.

    `TEMPLATE` is a running machine whose clones share the pack's RAM, `STREAM` a running machine whose RAM each clone reads, `DISK` a
    prepared disk that is booted.
    """

    TEMPLATE = "template"
    STREAM = "stream"
    DISK = "disk"

    @property
    def next(self) -> PackKind:
        """The kind to try when this one does not work here."""
        kinds = list(PackKind)
        return kinds[min(kinds.index(self) + 1, len(kinds) - 1)]


@attrs.frozen(kw_only=True)
class Capabilities:
    """What a backend can do on this host, found by trying.

    Attributes:
        backend: Its name.
        version: The hypervisor's own version text.
        accelerator: How guest code is run, such as `"kvm"` or `"tcg"`.
        reason: Why this accelerator, in one sentence, with the evidence.
        pack_kind: The best kind of pack it can restore here.
        pack_reason: Why this kind.
        emulated: Whether guest code is translated by software, an order of magnitude slower.
    """

    backend: str
    version: str
    accelerator: str
    reason: str
    pack_kind: PackKind
    pack_reason: str
    emulated: bool


@attrs.frozen(kw_only=True, repr=False)
class Keys:
    """The OpenSSH keys of a machine: ours to log in with, and its own, by which we know it. The representation hides them."""

    user_private: str
    user_public: str
    host_private: str
    host_public: str

    def __repr__(self) -> str:
        return "<Keys>"


@attrs.frozen(kw_only=True)
class Disk:
    """A disk image that stays as it is.

    Attributes:
        path: Where it is.
        format: `"qcow2"` or `"raw"`; never guessed from the content, which a guest may have written.
    """

    path: Path
    format: str = "qcow2"


@attrs.frozen(kw_only=True)
class Start:
    """What a machine starts from.

    Attributes:
        disks: The images its own overlay lies on, lowest first.
        disk_size: Bytes of the disk that the guest sees.
        kernel: A kernel to boot directly, or None to have the firmware boot the disk.
        initrd: Its initial RAM disk.
        cmdline: Its command line.
        firmware: What boots the disk where there is no kernel: `"bios"` or `"uefi"`.
        seed: The cloud-init seed, an ISO image.
        keys: The keys that the seed carries.
        saved: A folder that `Instance.save` filled, to be restored; None to boot.
        building: Whether the restored machine will itself be saved: then its RAM is a copy of its own.
    """

    disks: tuple[Disk, ...]
    disk_size: int
    kernel: Path | None
    initrd: Path | None
    cmdline: str
    seed: Path
    keys: Keys
    firmware: str = "bios"
    saved: Path | None = None
    building: bool = False


class Unwakeable(MachineError):
    """The guest cannot be saved with its RAM, because nothing could wake it; its disk still can be."""


# Finds whatever still carries a command's tag in its environment, children of children included, until nothing is left.
_KILL = r"""
for round in 1 2 3 4 5 6; do
  found=$(grep -lsz "^VMBOTTLE_EXEC=$1\$" /proc/[0-9]*/environ) # its status also tells of processes that were gone meanwhile
  [ -n "$found" ] || exit 0
  for file in $found; do pid=${file#/proc/}; kill -KILL "${pid%/environ}" 2>/dev/null; done
done
"""


@attrs.frozen(kw_only=True)
class Command:
    """A command as a channel gets it: an argv, its whole environment, and its input.

    Attributes:
        argv: Program and arguments; the program is looked up in the guest's standard path.
        env: The complete environment, nothing is inherited.
        input: What its standard input gives before it ends.
        tag: Marks the processes of this command, in their environment, so that a time-out can end them all.
    """

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    input: bytes = b""
    tag: str = attrs.field(factory=lambda: secrets.token_hex(8))

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """The environment with the tag in it."""
        return (*self.env, ("VMBOTTLE_EXEC", self.tag))

    def killer(self) -> Command:
        """The command that ends this one, with all it has started."""
        return Command(argv=("/bin/sh", "-c", _KILL, "sh", self.tag), env=(("PATH", GUEST_PATH),))


@attrs.frozen(kw_only=True)
class Finished:
    """How a command came to its end.

    Attributes:
        returncode: Its status, or -N for signal N.
        stdout: At most `MAX_OUTPUT` bytes.
        stderr: Likewise.
        truncated: Whether there was more.
        timed_out: Whether it was killed at its deadline.
    """

    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    timed_out: bool = False


def not_run(finished: Finished, command: Command) -> Finished:
    """The same outcome whatever said that the program could not be started: status 127 (not found) or 126 (not executable)."""
    reasons = {127: "not found", 126: "cannot be executed"}
    reason = reasons.get(finished.returncode)
    if reason is None or not finished.stderr.startswith(b"env: "):
        return finished
    return attrs.evolve(finished, stderr=f"{command.argv[0]}: {reason}\n".encode())


class Console:
    """The serial console of a machine, recorded from its first instant; control characters are neutralised."""

    _LIMIT = 4 << 20

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def text(self) -> str:
        """What the console has said so far; of a very talkative one the last 4 MiB."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - self._LIMIT))
                return printable(file.read(self._LIMIT).decode("utf-8", "replace"))
        except FileNotFoundError:
            return ""

    def tail(self, lines: int = 20) -> str:
        """The last lines of it."""
        return "\n".join(self.text.splitlines()[-lines:])

    def __repr__(self) -> str:
        return f"<Console {tail(self.text, 10)!r}>"


class Channel(Protocol):
    """A way to run commands in a guest. All channels give the same answer to the same command."""

    def run(self, command: Command, *, deadline: Deadline) -> Finished:
        """Runs a command to its end; at the deadline it is killed in the guest.

        Raises:
            MachineError: The guest cannot be reached any more.
        """

    def put(self, source: BinaryIO, command: Command, *, deadline: Deadline) -> Finished:
        """Runs a command with a host file of any size as its input."""

    def get(self, command: Command, sink: BinaryIO, *, deadline: Deadline) -> Finished:
        """Runs a command and writes its standard output, of any size, to a host file."""

    def close(self) -> None:
        """Gives up the connection; the guest runs on."""


class Instance(Protocol):
    """One running VM as its backend sees it."""

    @property
    def console(self) -> Console:
        """Its serial console."""

    @property
    def pid(self) -> int:
        """The hypervisor's process."""

    def channel(self, *, deadline: Deadline, bulk: bool = False) -> Channel:
        """A channel that has answered: the one with the quickest replies, or with `bulk` the one with the most throughput.

        Raises:
            MachineTimeout: Nothing answered by the deadline.
            MachineDied: The guest panicked or the hypervisor ended meanwhile.
        """

    def save(self, dest: Path, *, kind: PackKind, deadline: Deadline) -> None:
        """Stops the machine for good and writes it into the empty folder `dest`.

        All but a `DISK` can be given as `Start.saved`. Of any kind, `dest / "disk.qcow2"` is the machine's disk on top of `Start.disks`.

        Raises:
            Unwakeable: It cannot be saved as this kind, and runs on: it can still be saved as a `DISK`.
        """

    def pause(self) -> None:
        """Stops its processors."""

    def resume(self) -> None:
        """Lets them run on."""

    def reset(self) -> None:
        """Presses the reset button."""

    def stop(self) -> None:
        """Ends it and frees what it held; may be called again."""


@runtime_checkable
class Cabling(Protocol):
    """An instance that can be given one more network card while it runs, for a private LAN."""

    def plug_card(self, wire: socket.socket, *, mac: str) -> None:
        """Plugs in a card whose frames are the datagrams of a socket; from now on its cable is the one that is cut where links are cut.

        The caller may close its socket afterwards. It takes a moment until the guest sees the card.

        Raises:
            MachineError: It cannot be plugged in.
        """

    def unplug_card(self, *, deadline: Deadline) -> None:
        """Takes it out again.

        Raises:
            MachineError: The guest did not let go of it by the deadline.
        """


@runtime_checkable
class Forwarding(Protocol):
    """An instance that can make a guest's TCP port reachable from the host."""

    def forward(self, port: int) -> tuple[str, int]:
        """The host's address and port that lead to the guest's port."""


class Backend(Protocol):
    """Makes instances with one hypervisor."""

    def probe(self) -> Capabilities:
        """What it can do here, found by trying.

        Raises:
            BackendUnavailable: Nothing, and why.
        """

    def fingerprint(self, spec: MachineSpec) -> str:
        """A digest of all that a saved machine depends on besides its spec: program, machine type, accelerator, processor."""

    def launch(self, spec: MachineSpec, *, source: Start, rundir: Path, deadline: Deadline) -> Instance:
        """Starts a machine whose files go into the empty, private folder `rundir`.

        Raises:
            LaunchError: The hypervisor did not start.
        """
