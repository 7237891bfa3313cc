"""Run commands that the host asks for on a serial port; the guest's own Python runs it, 3.8 or newer.

Everything is a frame: length of the content, kind, number of the command, content. See `channels/runner.py`, the other end.
"""

import contextlib
import errno
import fcntl
import os
import selectors
import signal
import struct
import sys
import time

RUN, INPUT, TAKEN, SYNC, LEFT = 1, 2, 3, 4, 5
OUT, ERR, END, REFUSED, SYNCED, WRITTEN = 17, 18, 19, 20, 21, 22
HEAD, WINDOW, PIECE = struct.Struct(">IBI"), 1 << 20, 1 << 16

if not hasattr(os, "posix_spawn"):
    sys.exit(1)
lock = os.open("/run/vmbottle-runner.lock", os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:  # it runs already
    sys.exit()
port = os.open(sys.argv[1] if sys.argv[1:] else "/dev/virtio-ports/org.vmbottle.runner", os.O_RDWR)
# The command that started it ends at once, and this part stays, in a session of its own.
if os.fork():
    os._exit(0)
os.setsid()
os.chdir("/")
os.umask(0o022)
null = os.open(os.devnull, os.O_RDWR)
for fd in 0, 1, 2:
    os.dup2(null, fd)
with open("/proc/self/comm", "w") as comm:
    comm.write("vmbottle-runner")
# What befalls the unit of the guest agent, which started this, is not the end of commands.
with contextlib.suppress(OSError):
    os.makedirs("/sys/fs/cgroup/vmbottle", exist_ok=True)
    with open("/sys/fs/cgroup/vmbottle/cgroup.procs", "w") as group:
        group.write(str(os.getpid()))
try:
    login = os.open("/proc/self/loginuid", os.O_WRONLY)
except OSError:  # a kernel without audit
    login = -1
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
signal.signal(signal.SIGCHLD, lambda *_: None)
selector = selectors.DefaultSelector()
commands: "dict[int, Command]" = {}
outgoing = bytearray()


class Command:
    """A command that runs."""

    def __init__(self, number: int, pid: int, stdin: int) -> None:
        self.number, self.pid, self.stdin = number, pid, stdin
        self.input, self.is_last, self.is_left = b"", False, False
        if stdin >= 0:
            os.set_blocking(stdin, False)
        # The descriptor of each stream, and how much of it the host has not taken yet.
        self.open: dict[int, list[int]] = {}

    def watch(self, kind: int, fd: int) -> None:
        os.set_blocking(fd, False)
        self.open[kind] = [fd, 0]
        selector.register(fd, selectors.EVENT_READ, lambda: self.read(kind))

    def read(self, kind: int) -> None:
        state = self.open[kind]
        try:
            data = os.read(state[0], PIECE)
        except BlockingIOError:
            return
        if not self.is_left:
            send(kind, self.number, data)
            state[1] += len(data)
        if not data:
            selector.unregister(state[0])
            os.close(state[0])
            del self.open[kind]
            self.forget()
        elif state[1] >= WINDOW:  # the host has to take some of it first
            selector.unregister(state[0])

    def taken(self, kind: int, size: int) -> None:
        if kind in self.open:
            state = self.open[kind]
            before, state[1] = state[1], state[1] - size
            if before >= WINDOW > state[1]:
                selector.register(state[0], selectors.EVENT_READ, lambda: self.read(kind))

    def left(self) -> None:
        """Read on for nobody: the host takes no more, or is another one than started it."""
        self.is_left = True
        for kind, state in self.open.items():
            self.taken(kind, state[1])
        self.feed(b"")

    def feed(self, data: bytes) -> None:
        if self.stdin < 0:
            return
        was_empty, self.input, self.is_last = not self.input, self.input + data, not data
        if was_empty and self.input:
            selector.register(self.stdin, selectors.EVENT_WRITE, self.write)
        self.close_if_fed()

    def write(self) -> None:
        try:
            written = os.write(self.stdin, self.input[:PIECE])
        except BlockingIOError:
            return
        except OSError:  # it reads no more; the host hears of it
            written, self.input, self.is_last = 0, b"", True
            send(WRITTEN, self.number, b"-1")
        self.input = self.input[written:]
        if written:
            send(WRITTEN, self.number, b"%d" % written)
        if not self.input:
            selector.unregister(self.stdin)
        self.close_if_fed()

    def close_if_fed(self) -> None:
        if self.is_last and not self.input and self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def ended(self, status: int) -> None:
        self.pid = 0
        send(END, self.number, b"%d" % (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)))
        if self.stdin >= 0:
            if self.input:
                selector.unregister(self.stdin)
            os.close(self.stdin)
            self.stdin = -1
        self.forget()

    def forget(self) -> None:
        if not self.pid and not self.open:
            del commands[self.number]


def send(kind: int, number: int, content: bytes) -> None:
    outgoing.extend(HEAD.pack(len(content), kind, number) + content)


def flush() -> None:
    """Write what fits: whoever waited here for the host would not read what the host sends meanwhile."""
    with contextlib.suppress(BlockingIOError):
        while outgoing:
            del outgoing[: os.write(port, outgoing)]
    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if outgoing else 0)
    if selector.get_key(port).events != wanted:
        selector.modify(port, wanted, serve)


def find(name: bytes, path: bytes) -> bytes:
    if b"/" in name:
        return name
    there = [each for each in (folder + b"/" + name for folder in path.split(b":")) if os.path.isfile(each)]
    found = next((each for each in there if os.access(each, os.X_OK)), None)
    if found is None:
        raise OSError(errno.EACCES if there else errno.ENOENT, "cannot be run")
    return found


def run(number: int, content: bytes) -> None:
    has_input, tag, path, count, *words = content.split(b"\0")
    argv, env = words[: int(count)], dict(word.split(b"=", 1) for word in words[int(count) :])
    with contextlib.suppress(OSError):  # then its processes are known by their environment alone
        os.pwrite(login, tag, 0)
    pipes = [os.pipe(), os.pipe()]
    stdin, feeding = os.pipe() if has_input == b"1" else (os.dup(null), -1)
    theirs = (stdin, *(writing for _, writing in pipes))
    actions = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(theirs)]
    defaults = (signal.SIGPIPE, signal.SIGXFSZ)  # which Python ignores
    try:
        pid = os.posix_spawn(find(argv[0], path), argv, env, file_actions=actions, setsigmask=(), setsigdef=defaults)
    except OSError as error:
        send(REFUSED, number, str(error.errno).encode())
        for fd in {feeding, *(reading for reading, _ in pipes)} - {-1}:
            os.close(fd)
    else:
        commands[number] = Command(number, pid, feeding)
        commands[number].watch(OUT, pipes[0][0])
        commands[number].watch(ERR, pipes[1][0])
    for fd in theirs:
        os.close(fd)


def reap() -> None:
    os.read(woken, PIECE)
    by_pid = {command.pid: command for command in commands.values() if command.pid}
    while by_pid:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        if pid in by_pid:
            by_pid.pop(pid).ended(status)


def handle(kind: int, number: int, content: bytes) -> None:
    if kind == RUN:
        run(number, content)
    elif kind == SYNC:
        send(SYNCED, number, content)
    elif number in commands:
        if kind == INPUT:
            commands[number].feed(content)
        elif kind == TAKEN:
            commands[number].taken(content[0], int(content[1:]))
        elif kind == LEFT:
            commands[number].left()


incoming = bytearray()


def serve() -> None:
    """Take what the host has sent; what is to be written is written after each turn."""
    try:
        data = os.read(port, PIECE)
    except BlockingIOError:
        return
    if not data:  # nobody is connected on the host
        time.sleep(0.01)
        return
    incoming.extend(data)
    while len(incoming) >= HEAD.size:
        size, kind, number = HEAD.unpack_from(incoming)
        if len(incoming) < HEAD.size + size:
            return
        content = bytes(incoming[HEAD.size : HEAD.size + size])
        del incoming[: HEAD.size + size]
        handle(kind, number, content)


os.set_blocking(port, False)
selector.register(port, selectors.EVENT_READ, serve)
selector.register(woken, selectors.EVENT_READ, reap)
while True:
    for key, _ in selector.select():
        # One that was handled before it may have ended it.
        if key.fileobj in selector.get_map():
            key.data()
    flush()
