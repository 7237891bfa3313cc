"""The ports: what a hypervisor must offer (`Backend`, `Instance`, `Channel`), and the values that pass through them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import attrs

from pytest_vmbottle._os import Deadline
from pytest_vmbottle.console import Console
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.spec import MachineSpec

__all__ = [
    "GUEST_MAC",
    "GUEST_PATH",
    "MAX_OUTPUT",
    "Backend",
    "Cabling",
    "Capabilities",
    "Channel",
    "Chord",
    "Command",
    "Console",
    "Detached",
    "Disk",
    "Display",
    "Finished",
    "Forwarding",
    "Hotplug",
    "Instance",
    "Keeping",
    "Keys",
    "Link",
    "NotPlugged",
    "OwnImage",
    "OwnImages",
    "PackKind",
    "Powered",
    "Running",
    "SecureShell",
    "Selective",
    "Snapshots",
    "Spawning",
    "SshAccess",
    "Start",
    "State",
    "Terminal",
    "Terminals",
    "Unwakeable",
    "Watching",
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


_NO_KEYS = Keys(user_private="", user_public="", host_private="", host_public="")


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
        kept: Whether the machine ran before in the same folder, and goes on with the disk that it has there.
        image: What it starts from without `saved`, where the backend has images of its own: see `OwnImages`. Then there are no disks, and
            neither seed nor keys.
        forwards: Ports of the guest, and the ports of the host that lead to them if they are still free.
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
    kept: bool = False
    image: str = ""
    forwards: tuple[tuple[int, int], ...] = ()

    @classmethod
    def own(cls, *, image: str = "", saved: Path | None = None, building: bool = False) -> Start:
        """What a machine starts from whose backend has images of its own."""
        return cls(
            disks=(),
            disk_size=0,
            kernel=None,
            initrd=None,
            cmdline="",
            seed=Path(),
            keys=_NO_KEYS,
            image=image,
            saved=saved,
            building=building,
        )


class State(StrEnum):
    """What a machine is doing: `OFF` is the end that it came to in order, `DIED` any other."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    DIED = "died"


class Unwakeable(MachineError):
    """The guest cannot be saved with its RAM, because nothing could wake it; its disk still can be."""


class NotPlugged(MachineError):
    """The machine cannot be given a device now; everything else works."""


_LOGINS = range(0x70000000, 0x7FFE0000)
"""Numbers that no user has, nor any container's (UIDs and GIDs in systemd's documentation)."""

# Finds what a command has started by the number of its login, or else by its mark in their environments. For SIGKILL until nothing is left:
# all are stopped first, so that none goes on because of another's end. The agent has the number of what it started last.
_KILL = r"""
tag=$1 signal=$2 status=3
for round in 1 2 3 4 5 6 7 8; do
  found=$(grep -lsxe "$tag" /proc/[0-9]*/loginuid | sed s/loginuid/stat/ | xargs -r grep -Lse ') [ZX] ' -e '^[0-9]* (qemu-ga) ')
  # Its status, which does not count, also tells of processes that were gone meanwhile.
  [ -n "$found" ] || found=$(grep -ls "VMBOTTLE_EXEC=$tag" /proc/[0-9]*/environ)
  [ -n "$found" ] || exit $status
  set --; status=0
  for file in $found; do pid=${file#/proc/}; set -- "$@" "${pid%/*}"; done
  [ "$signal" != KILL ] || kill -s STOP "$@" 2>/dev/null
  kill -s "$signal" "$@" 2>/dev/null
  [ "$signal" = KILL ] || exit 0
done
"""


@attrs.frozen(kw_only=True)
class Command:
    """A command as a channel gets it: an argv, its whole environment, and its input.

    Attributes:
        argv: Program and arguments; the program is looked up in the guest's standard path.
        env: The complete environment, nothing is inherited.
        input: What its standard input gives before it ends.
        tag: The number by which all processes of this command are known, so that a time-out can end them. The kernel's audit hands down the
            number of a login (/proc/self/loginuid), which neither another user, another session, a clean environment nor another control
            group sheds; it is in their environment for kernels without it.
    """

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    input: bytes = b""
    tag: str = attrs.field(factory=lambda: str(secrets.choice(_LOGINS)))

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """The environment with the tag in it."""
        return (*self.env, ("VMBOTTLE_EXEC", self.tag))

    def killer(self, signal: str = "KILL") -> Command:
        """The command that sends a signal to this one, with all it has started; its status is 3 where there was nothing to send it to."""
        return Command(argv=("/bin/sh", "-c", _KILL, "sh", self.tag, signal), env=(("PATH", GUEST_PATH),))


@attrs.frozen(kw_only=True)
class Finished:
    """How a command came to its end.

    Attributes:
        returncode: Its status, or -N for signal N.
        stdout: At most `MAX_OUTPUT` bytes.
        stderr: Likewise.
        truncated: Whether there was more.
        timed_out: Whether it was killed at its deadline.
        outlived: Whether it had ended by itself before, and what it had left behind, which held its output, was killed.
    """

    returncode: int
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False
    timed_out: bool = False
    outlived: bool = False


def not_run(finished: Finished, command: Command) -> Finished:
    """The same outcome whatever said that the program could not be started: status 127 (not found) or 126 (not executable)."""
    reasons = {127: "not found", 126: "cannot be executed"}
    reason = reasons.get(finished.returncode)
    if reason is None or not finished.stderr.startswith(b"env: "):
        return finished
    return attrs.evolve(finished, stderr=f"{command.argv[0]}: {reason}\n".encode())


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


@runtime_checkable
class Hotplug(Protocol):
    """An instance that can be given a disk while it runs."""

    def disk(self, file: int, *, serial: str, writable: bool, deadline: Deadline) -> AbstractContextManager[Callable[[], int]]:
        """A raw disk that the guest has as long as the context lasts; gives what tells how many bytes the guest has read or written so far.

        It may take a moment until the guest sees it, or for ever if it has no driver for it. It is gone at the end, unless the guest does
        not let go of it.

        Args:
            file: Descriptor of the regular file that is its content, open as it is to be used.
            serial: What the guest finds it by: at most 20 bytes.
            writable: Whether the guest may write to it.
            deadline: Until when to try.

        Raises:
            NotPlugged: It cannot be given one now.
        """


Chord = tuple[str, ...]
"""Keys that are held down together, by QEMU's names for them (QKeyCode in qapi/ui.json)."""


@runtime_checkable
class Display(Protocol):
    """An instance that may have a screen and a keyboard."""

    def screenshot(self) -> bytes:
        """What the screen shows, as PNG.

        Raises:
            MachineError: It cannot.
        """

    def press(self, chords: Iterable[Chord]) -> None:
        """Presses keys, one chord after the other.

        Raises:
            MachineError: A key is unknown, or the machine is not running.
        """


@runtime_checkable
class Watching(Protocol):
    """An instance that tells how its guest is without asking it."""

    @property
    def exitcode(self) -> int | None:
        """The hypervisor's exit status, 0 after the guest powered off; None while it runs."""

    @property
    def panic(self) -> str | None:
        """The line by which the guest's kernel said that it panicked, met a bug of its own, or that a task hangs."""

    def alive(self) -> None:
        """Returns if the guest can still answer.

        Raises:
            GuestPanic: Its kernel said that it is in trouble, and the spec does not expect that.
            MachineDied: It is gone.
        """


class Running(Protocol):
    """A command that runs in a guest while its caller does something else."""

    @property
    def returncode(self) -> int | None:
        """Its status, or -N for signal N; None while it runs.

        Raises:
            MachineError: It cannot be known, or no more of its output can come, because the guest cannot be reached any more.
        """

    def wait(self, *, deadline: Deadline) -> int | None:
        """Waits for its status; None if it has none by the deadline."""

    def write(self, data: bytes, *, deadline: Deadline) -> None:
        """Gives it input.

        Raises:
            BrokenPipeError: It takes no more.
            MachineTimeout: It did not take it by the deadline.
        """

    def close_input(self) -> None:
        """Ends its input."""

    def close(self) -> None:
        """Gives up the connection to it."""


@runtime_checkable
class Spawning(Protocol):
    """A channel on which commands run beside each other, and give their output as it comes."""

    def start(
        self, command: Command, *, stdout: Callable[[bytes], object], stderr: Callable[[bytes], object], deadline: Deadline
    ) -> Running:
        """Starts a command; its streams go to the two functions, in other threads, with `b""` at their ends. Its input stays open."""


@runtime_checkable
class Link(Protocol):
    """An instance whose network cable can be pulled."""

    def link(self, *, up: bool) -> None:
        """Plugs it in, or pulls it."""


@attrs.frozen(kw_only=True)
class SshAccess:
    """What it takes to log in to a machine by SSH.

    Attributes:
        address: The host's address and port that lead to the guest's SSH server.
        user: Whom its key lets in.
        keys: The key to log in with, and the machine's own.
        folder: A private folder that is removed with the machine.
    """

    address: tuple[str, int]
    user: str
    keys: Keys
    folder: Path


@runtime_checkable
class SecureShell(Protocol):
    """An instance that any SSH client can log in to."""

    def ssh_access(self) -> SshAccess:
        """How."""


class Terminal(Protocol):
    """A program in a guest that runs on a terminal of its own there."""

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` has something."""

    def receive(self) -> bytes:
        """What it has written; nothing at its end."""

    def send(self, data: bytes) -> None:
        """Types on it."""

    def resize(self, columns: int, lines: int) -> None:
        """Tells it how large the window is now."""

    @property
    def status(self) -> int | None:
        """How the program ended: its status, -N for signal N, or None if that is not known."""

    def close(self) -> None:
        """Hangs up."""


@runtime_checkable
class Terminals(Protocol):
    """A channel that offers terminals."""

    def terminal(self, *, user: str, kind: str, size: tuple[int, int], deadline: Deadline) -> Terminal:
        """Starts a user's login shell on a terminal.

        Args:
            user: A user of the guest.
            kind: What understands its control sequences: the variable `TERM`.
            size: Columns and lines.
            deadline: When it has to be there.

        Raises:
            MachineError: The guest cannot be reached any more.
        """


@runtime_checkable
class Powered(Protocol):
    """An instance with a power switch, which can be launched again with `Start.kept`."""

    def state(self) -> State:
        """What it is doing, asked now."""

    @property
    def forwards(self) -> Mapping[int, int]:
        """The host's ports that somebody was told of, by the guest's."""

    def shut_down(self, *, deadline: Deadline) -> bool:
        """Has the guest power itself off in order; whether it had by the deadline."""

    def cut(self) -> None:
        """Ends it at once, as if its plug was pulled."""

    def reboot(self, *, deadline: Deadline) -> bool:
        """Has the guest reboot itself in order, and forgets the channels; whether it had begun anew by the deadline."""


@runtime_checkable
class Snapshots(Protocol):
    """An instance that can be written down and goes on."""

    def snapshot(self, dest: Path, *, deadline: Deadline) -> None:
        """Writes the machine, RAM included, into the empty folder `dest`; it stands still meanwhile and goes on whatever happens.

        `dest` can be given as `Start.saved`, with `dest / "disk.qcow2"` on top of the `Start.disks` that it was launched with.

        Raises:
            Unwakeable: Nothing could wake the guest after a restore.
            MachineError: It could not be written.
        """


@attrs.frozen(kw_only=True)
class OwnImage:
    """An image as a backend with images of its own finds it.

    Attributes:
        name: What people call it.
        reference: What the backend knows it by: `Start.image`.
        digest: Of its content, or of what stands for that.
        quick: Whether a machine starts from it about as quickly as from a pack of it, so that none is made.
    """

    name: str
    reference: str
    digest: str
    quick: bool


@runtime_checkable
class OwnImages(Protocol):
    """A backend whose machines do not start from disks of the catalog, but from images that it finds itself."""

    def find_image(self, source: str | Path) -> OwnImage:
        """The image that a spec's source stands for.

        Raises:
            SpecError: There is none.
        """

    def pack_image(self, reference: str, dest: Path, *, deadline: Deadline) -> None:
        """Writes an image into the empty folder `dest`, which can be given as `Start.saved`.

        Raises:
            MachineError: It could not be had.
        """


@runtime_checkable
class Keeping(Protocol):
    """A backend that keeps something of a machine elsewhere than in its folder."""

    def discard(self, rundir: Path) -> None:
        """Removes that, when the machine has ended for good; there may be nothing."""

    def close(self) -> None:
        """Ends what it has started for itself; may be called again."""


@runtime_checkable
class Selective(Protocol):
    """A backend that cannot make every machine which a spec describes."""

    def refusal(self, spec: MachineSpec) -> str | None:
        """What of a spec it cannot do, in one sentence; None if nothing. It runs nothing to find out."""


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


@runtime_checkable
class Detached(Protocol):
    """A backend whose machines go on when whoever started them is gone."""

    def ending(self, rundir: Path) -> tuple[str, ...]:
        """The command that ends the machine with this folder for good, whatever it is doing, and frees what it holds; 0 if there is none.

        It is written down before the machine is launched, and run without a shell by whoever cleans up when its owner has died.
        """
