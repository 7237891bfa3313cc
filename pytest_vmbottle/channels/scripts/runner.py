"""Run commands that the host asks for on a serial port; the guest's own Python runs it, 3.8 or newer.

Everything is a frame: length of the content, kind, number of the command, content. See `channels/runner.py`, the other end.
"""

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import selectors
import signal
import stat
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

RUN, INPUT, TAKEN, SYNC, LEFT, FILE, KILL, TERMINAL, SIZE = 1, 2, 3, 4, 5, 6, 7, 8, 9
OUT, ERR, END, REFUSED, SYNCED, WRITTEN, LEVEL = 17, 18, 19, 20, 21, 22, 23
UMASK, UNABLE, LONGEST = 0o022, 120, 100
RESIZE = 0x5414  # TIOCSWINSZ of asm-generic/ioctls.h: a Debian that has python3-minimal has no termios
GROUP, FEW = b"/sys/fs/cgroup/vmbottle", 4
# Whatever this process or those above it ignore: a shell cannot catch what is ignored when it begins.
DEFAULTS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
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
os.umask(UMASK)
null = os.open(os.devnull, os.O_RDWR)
for fd in 0, 1, 2:
    os.dup2(null, fd)
with open("/proc/self/comm", "w") as comm:
    comm.write("vmbottle-runner")
# What befalls the unit of the guest agent, which started this, is not the end of commands.
group = -1
with contextlib.suppress(OSError):
    os.makedirs(GROUP, exist_ok=True)
    group = os.open(GROUP + b"/cgroup.procs", os.O_WRONLY)
    os.write(group, b"0")
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
empty: "list[bytes]" = []
outgoing = bytearray()
highest = 0


class Command:
    """A command that runs."""

    def __init__(self, number: int, pid: int, stdin: int, tag: bytes = b"") -> None:
        self.number, self.pid, self.stdin, self.tag = number, pid, stdin, tag
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
        except OSError:  # so a terminal says that nobody has it open any more
            data = b""
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
        if self.tag:
            empty.append(self.tag)
        self.close_input()
        self.forget()

    def close_input(self) -> None:
        if self.stdin >= 0:
            if self.input:
                selector.unregister(self.stdin)
            os.close(self.stdin)
            self.stdin, self.input = -1, b""

    def forget(self) -> None:
        if not self.pid and not self.open:
            del commands[self.number]


class Screen(Command):
    """A command that has a terminal in place of pipes."""

    def __init__(self, number: int, pid: int, terminal: int, tag: bytes) -> None:
        super().__init__(number, pid, os.dup(terminal), tag)
        send(ERR, number, b"")
        self.watch(OUT, terminal)

    def left(self) -> None:
        """Hang up: who has this terminal ends with the connection."""
        self.is_left = True
        self.close_input()
        # The kernel tells only who leads the session, and runuser(1) takes no notice.
        with contextlib.suppress(OSError, KeyError):
            group = os.tcgetpgrp(self.open[OUT][0])
            if group > 1:  # 0 would be that of this program
                os.killpg(group, signal.SIGHUP)
        self.hang_up()
        self.forget()

    def hang_up(self) -> None:
        fd, taken = self.open.pop(OUT, [-1, 0])
        if fd >= 0:
            if taken < WINDOW:
                selector.unregister(fd)
            os.close(fd)
            send(OUT, self.number, b"")

    def ended(self, status: int) -> None:
        # What it has shown last. Then those that it left behind lose the terminal.
        with contextlib.suppress(OSError):
            data = b"the last"
            while OUT in self.open and data:
                data = os.read(self.open[OUT][0], PIECE)
                if data:
                    send(OUT, self.number, data)
        self.hang_up()
        super().ended(status)


def resize(command: Command, content: bytes) -> None:
    if isinstance(command, Screen) and OUT in command.open:
        set_size(command.open[OUT][0], content)


def set_size(terminal: int, content: bytes) -> None:
    columns, lines = map(int, content.split())
    fcntl.ioctl(terminal, RESIZE, struct.pack("HHHH", lines, columns, 0, 0))


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


def spawn(tag: bytes, name: bytes, path: bytes, argv: "list[bytes]", env: "dict[bytes, bytes]", **how: "Any") -> int:
    """Start a program, in a control group of that name, if any: what it starts stays in that, whatever its user and login become."""
    program = find(argv[0], path)
    with contextlib.suppress(OSError):  # a kernel without audit
        os.pwrite(login, tag, 0)
    if group >= 0 and name:
        with contextlib.suppress(OSError):  # then its processes are known by their login, or by their environment
            enter(GROUP + b"/" + name)
    try:
        return os.posix_spawn(program, argv, env, setsigmask=(), setsigdef=DEFAULTS, **how)
    except OSError:
        if name:
            empty.append(name)
        raise
    finally:
        if name:
            with contextlib.suppress(OSError):
                os.write(group, b"0")


def enter(path: bytes) -> None:
    """Be in a new control group, as then is what begins."""
    os.mkdir(path)
    fd = os.open(path + b"/cgroup.procs", os.O_WRONLY)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def tidy() -> None:
    """Remove groups of commands that have ended: a few in a turn, since what was left behind may run for long."""
    for tag in empty[:FEW]:
        del empty[0]
        try:
            os.rmdir(GROUP + b"/" + tag)
        except FileNotFoundError:
            pass
        except OSError:  # something is left in it
            empty.append(tag)


def run(number: int, content: bytes) -> None:
    has_input, tag, name, path, count, *words = content.split(b"\0")
    argv, env = words[: int(count)], dict(word.split(b"=", 1) for word in words[int(count) :])

    def begin(theirs: "tuple[int, ...]") -> int:
        return spawn(tag, name, path, argv, env, file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(theirs)])

    start(number, has_input, begin, name)


def start(number: int, has_input: bytes, begin: "Callable[[tuple[int, ...]], int]", name: bytes = b"") -> None:
    """Start a process with streams of its own, which `begin` gets, and whose number it returns."""
    global highest  # noqa: PLW0603 - of this whole process
    pipes = pipes_of(3 if has_input == b"1" else 2)
    stdin, feeding = pipes.pop() if has_input == b"1" else (null, -1)
    theirs = (stdin, *(writing for _, writing in pipes))
    highest = max(highest, feeding, *theirs)
    try:
        pid = begin(theirs)
    except OSError as error:
        send(REFUSED, number, str(error.errno).encode())
        for fd in {feeding, *(reading for reading, _ in pipes)} - {-1}:
            os.close(fd)
    else:
        commands[number] = Command(number, pid, feeding, name)
        commands[number].watch(OUT, pipes[0][0])
        commands[number].watch(ERR, pipes[1][0])
    for fd in {*theirs} - {null}:
        os.close(fd)


def pipes_of(count: int) -> "list[tuple[int, int]]":
    made: "list[tuple[int, int]]" = []
    try:
        while len(made) < count:
            made.append(os.pipe())
    except OSError:
        for pair in made:
            os.close(pair[0])
            os.close(pair[1])
        raise
    return made


def show(number: int, content: bytes) -> None:
    """Start a command on a terminal."""
    tag, name, path, size, count, *words = content.split(b"\0")
    argv, env = words[: int(count)], dict(word.split(b"=", 1) for word in words[int(count) :])
    terminal, its = os.openpty()
    set_size(terminal, size)
    # Who leads a session has as its terminal the first one that it opens.
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.ttyname(its), os.O_RDWR, 0), (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
    try:
        pid = spawn(tag, name, path, argv, env, file_actions=actions, setsid=True)
    except (OSError, NotImplementedError) as error:  # a C library may start nothing in a session of its own
        send(REFUSED, number, b"%d" % (getattr(error, "errno", None) or errno.ENOSYS))
        os.close(terminal)
    else:
        commands[number] = Screen(number, pid, terminal, name)
    os.close(its)


# -- files: a copy of this process does what would cost a program each, with the words, statuses and output of the scripts for that -------


def operate(number: int, content: bytes) -> None:
    has_input, verb, user, *words = content.split(b"\0")

    def begin(theirs: "tuple[int, ...]") -> int:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                for to, fd in enumerate(theirs):
                    os.dup2(fd, to)
                # Not those of commands, whose end would not be seen as long as this one waits for something.
                os.closerange(3, highest + 1)
                status = perform(verb, user, words)
            finally:
                os._exit(status)
        return pid

    start(number, has_input, begin)


def perform(verb: bytes, user: bytes, words: "list[bytes]") -> int:
    try:
        if user != b"root":
            entry = pwd.getpwnam(os.fsdecode(user))
            os.initgroups(entry.pw_name, entry.pw_gid)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
    except KeyError:
        os.write(2, b"there is no user " + user + b" in the guest\n")
        return 125
    if verb not in OPERATIONS:
        return UNABLE
    try:
        return OPERATIONS[verb](*words) or 0
    except OSError as error:
        os.write(2, os.fsencode(f"{os.fsdecode(verb)}: {error.strerror}\n"))
        return 1


def put(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def show_status(path: bytes, how: bytes) -> None:
    s = os.stat(path, follow_symlinks=how == b"-L")
    times = [divmod(each, 10**9) for each in (s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns)]
    numbers = (s.st_ino, s.st_dev, s.st_nlink, s.st_uid, s.st_gid, s.st_size, *(whole for whole, _ in times), s.st_blocks, s.st_blksize)
    device = f"{os.major(s.st_rdev):x} {os.minor(s.st_rdev):x}"
    fractions = "|".join(f".{fraction:09}" for _, fraction in times)
    put(1, f"{s.st_mode:x} {' '.join(map(str, numbers))} {device}|{fractions}\n".encode())


def show_owner(path: bytes, which: bytes) -> None:
    found = os.stat(path)
    try:
        name = pwd.getpwuid(found.st_uid).pw_name if which == b"%U" else grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        name = "UNKNOWN"
    put(1, os.fsencode(name) + b"\n")


def read(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY)
    data = b"the first"
    while data:
        data = os.read(fd, PIECE)
        put(1, data)


def follow(path: bytes) -> bytes:
    for _ in range(41):
        if not os.path.islink(path):
            return path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def numbers_of(owner: bytes) -> "tuple[int, int]":
    """Return user and group of an owner as chown(1) takes it, -1 where it names none."""
    user, colon, group = os.fsdecode(owner).partition(":")
    uid = gid = -1
    kind = "user"
    try:
        if user:
            uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
            if colon and not group:
                gid = pwd.getpwuid(uid).pw_gid
        kind = "group"
        if group:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(0, f"chown: invalid {kind}: '{os.fsdecode(owner)}'") from None
    return uid, gid


def make_beside(path: bytes) -> "tuple[bytes, int]":
    """Make a file beside another one, whose name it gets later; return the other one itself where it alone can be written."""
    new = os.path.join(os.path.dirname(path), b".vmbottle." + os.urandom(6).hex().encode())
    try:
        return new, os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR} or not os.access(path, os.W_OK):
            raise
    return path, in_place(path)


def in_place(path: bytes) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)


def copy_input(fd: int) -> int:
    """Copy the input to a file, and return how much it was."""
    written, data = 0, b"the first"
    while data:
        data = os.read(0, WINDOW)
        put(fd, data)
        written += len(data)
    os.close(fd)
    return written


def write(path: bytes, size: bytes, mode: bytes, owner: bytes) -> "int | None":
    path, old = follow(path), None
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(path)
    if old is not None and stat.S_ISDIR(old.st_mode):
        return 102
    is_ours = old is None or (stat.S_ISREG(old.st_mode) and os.geteuid() in {0, old.st_uid})
    new, fd = make_beside(path) if is_ours else (path, in_place(path))
    try:
        if copy_input(fd) != int(size) and new != path:  # where a connection is lost, the input just ends
            raise OSError(errno.EIO, "only a part of it arrived")
        if new != path and old is None:
            mode = mode or b"%o" % (0o666 & ~UMASK)
        elif new != path and old is not None:
            owner, mode = owner or b"%d:%d" % (old.st_uid, old.st_gid), mode or b"%o" % stat.S_IMODE(old.st_mode)
        settle(new, path, mode, owner)
    except BaseException:
        if new != path:
            with contextlib.suppress(OSError):
                os.unlink(new)
        raise
    return None


def settle(new: bytes, path: bytes, mode: bytes, owner: bytes) -> None:
    """Give a file its owner, its mode and its name."""
    if owner:
        os.chown(new, *numbers_of(owner))
    if mode:
        os.chmod(new, int(mode, 8))
    if new != path:
        os.rename(new, path)


def place(target: bytes, name: bytes, size: bytes, mode: bytes, mtime: bytes) -> "int | None":
    """Write the input to a new file, as an unpacked archive with that file alone would be."""
    path = os.path.join(target, name) if os.path.isdir(target) else target
    os.stat(os.path.dirname(path) + b"/")
    new = os.path.join(os.path.dirname(path), b".vmbottle." + os.urandom(6).hex().encode())
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if copy_input(fd) != int(size):
            raise OSError(errno.EIO, "only a part of it arrived")
        os.chmod(new, int(mode, 8))
        os.utime(new, (time.time(), int(mtime)))
        if not os.path.isdir(path):
            os.rename(new, path)
            return None
        os.unlink(new)
    except BaseException:
        os.unlink(new)
        raise
    return 102


def fetch(path: bytes, most: bytes) -> "int | None":
    """Print a tar archive (POSIX ustar) with a regular file that has no holes, and is not too long."""
    s = os.lstat(path)
    if not stat.S_ISREG(s.st_mode) or s.st_size > int(most) or s.st_blocks * 512 < s.st_size:
        return UNABLE
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    s, name = os.fstat(fd), b"./" + os.path.basename(path)
    if len(name) > LONGEST or not 0 <= s.st_mtime < 1 << 33 or s.st_size > int(most):
        return UNABLE
    about = (stat.S_IMODE(s.st_mode), s.st_size, int(s.st_mtime))
    head = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0        0%s" % (name.ljust(LONGEST, b"\0"), about[0], 0, 0, *about[1:], bytes(100))
    head = (head + b"ustar\00000").ljust(512, b"\0")
    put(1, head[:148] + b"%06o\0 " % sum(head) + head[156:])
    left = s.st_size
    while left:
        data = os.read(fd, min(PIECE, left))
        if not data:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        put(1, data)
        left -= len(data)
    put(1, bytes(-s.st_size % 512 + 1024))
    return None


def list_folder(path: bytes, _depth: bytes, _follow: bytes) -> "int | None":
    kinds = {stat.S_IFDIR: b"d", stat.S_IFLNK: b"l", stat.S_IFREG: b"f", stat.S_IFIFO: b"p", stat.S_IFSOCK: b"s", stat.S_IFBLK: b"b"}
    os.stat(path + b"/")
    if not os.access(path, os.R_OK):
        return 105
    found = bytearray()
    with os.scandir(path + b"/") as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                s = entry.stat(follow_symlinks=False)
                kind, (whole, rest) = kinds.get(stat.S_IFMT(s.st_mode), b"c"), divmod(s.st_mtime_ns, 10**9)
                found += b"%s %d %o %d.%09d %s/%s\0" % (kind, s.st_size, stat.S_IMODE(s.st_mode), whole, rest, path, entry.name)
    put(1, bytes(found))
    return None


def make_folder(path: bytes, exist_ok: bytes, parents: bytes, mode: bytes) -> "int | None":
    if exist_ok and os.path.isdir(path):
        return 0
    if parents:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except FileExistsError:  # one of them is no folder
            return 103
    bits = int(mode, 8)
    os.mkdir(path, bits)
    if bits & 0o7000:  # which mkdir(2) ignores
        os.chmod(path, bits & ~UMASK)
    return None


def touch(path: bytes, mode: bytes, exist_ok: bytes) -> "int | None":
    if not exist_ok and os.path.lexists(path):
        return 104
    if os.path.exists(path):
        os.utime(path)
        return None
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.fchmod(fd, int(mode, 8) & ~UMASK)
    return None


def link(path: bytes, target: bytes, how: bytes) -> None:
    (os.symlink if how else os.link)(target, path)


OPERATIONS: "dict[bytes, Callable[..., int | None]]" = {
    b"chmod": lambda path, mode: os.chmod(path, int(mode, 8)),
    b"chown": lambda path, owner: os.chown(path, *numbers_of(owner)),
    b"fetch": fetch,
    b"link": link,
    b"list": list_folder,
    b"mkdir": make_folder,
    b"owner": show_owner,
    b"place": place,
    b"read": read,
    b"readlink": lambda path: put(1, os.readlink(path) + b"\n"),
    b"rename": os.rename,
    b"rmdir": os.rmdir,
    b"stat": show_status,
    b"touch": touch,
    b"unlink": os.unlink,
    b"write": write,
}


# -- what comes from the host -------------------------------------------------------------------------------------------------------------


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


def synced(number: int, content: bytes) -> None:
    send(SYNCED, number, content)
    send(LEVEL, number, b"3")


def kill(command: Command) -> None:
    if command.pid:
        os.kill(command.pid, signal.SIGKILL)


ASKED: "dict[int, Callable[[int, bytes], object]]" = {RUN: run, FILE: operate, SYNC: synced, TERMINAL: show}
OF_COMMANDS: "dict[int, Callable[[Command, bytes], object]]" = {
    INPUT: Command.feed,
    TAKEN: lambda command, content: command.taken(content[0], int(content[1:])),
    LEFT: lambda command, _: command.left(),
    KILL: lambda command, _: kill(command),
    SIZE: resize,
}


def handle(kind: int, number: int, content: bytes) -> None:
    if kind in ASKED:
        try:
            ASKED[kind](number, content)
        except OSError as error:  # too many open files are no end of other commands
            send(REFUSED, number, b"%d" % (error.errno or errno.EIO))
    elif kind in OF_COMMANDS and number in commands:
        OF_COMMANDS[kind](commands[number], content)


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
    ready = selector.select()
    for key, _ in ready:
        # One that was handled before it may have ended it.
        if key.fileobj in selector.get_map():
            key.data()
    flush()
    # Now that the host has heard of the end.
    if empty and any(key.fileobj == woken for key, _ in ready):
        tidy()
