"""Holds a fault in a guest: python3 -c SCRIPT TOKEN FAULT ARGUMENT...; it prints its process id when the fault has begun.

The fault ends, and with it the process that holds it, by SIGTERM.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import errno
import glob
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Callable, ContextManager, Iterator

PAGE = 4096
LIBC = ctypes.CDLL(None, use_errno=True)


def available() -> int:
    """Return the bytes of memory that programs can still get."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))


def pids_of(target: str) -> list[str]:
    """Return the processes of a unit, or the one of a number."""
    if target.isdigit():
        return [target]
    shown = subprocess.run(["systemctl", "show", "-p", "ControlGroup", target], check=False, stdout=subprocess.PIPE, text=True)
    group = shown.stdout.strip().partition("=")[2]
    if not group:
        sys.exit("there is no running unit " + target)
    found: list[str] = []
    for path in glob.glob("/sys/fs/cgroup" + group + "/**/cgroup.procs", recursive=True):
        with open(path) as file:
            found += file.read().split()
    return found


@contextlib.contextmanager
def disk_full(path: str, leave: str) -> Iterator[None]:
    """Fill a file system."""
    name = os.path.join(path, ".vmbottle-full-%d" % os.getpid())
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        at, size = 0, 1 << 40
        while size >= PAGE:
            free = os.statvfs(path)
            room = free.f_bfree * free.f_frsize - int(leave)
            size = min(size, room // PAGE * PAGE)
            if size <= 0:
                break
            try:
                os.posix_fallocate(fd, at, size)
                at += size
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # What the file system needs for itself is not there for the file.
                size //= 2
        os.fsync(fd)
        yield
    finally:
        os.close(fd)
        os.unlink(name)


@contextlib.contextmanager
def inodes_full(path: str) -> Iterator[None]:
    """Use up the inodes of a file system."""
    folder = os.path.join(path, ".vmbottle-inodes-%d" % os.getpid())
    os.mkdir(folder)
    try:
        count = 0
        while True:
            try:
                os.close(os.open("%s/%d" % (folder, count), os.O_CREAT | os.O_WRONLY, 0o600))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
            count += 1
        yield
    finally:
        # A few at once, which ends the fault, and the rest by somebody whom nobody waits for.
        for name in os.listdir(folder)[:64]:
            os.unlink(os.path.join(folder, name))
        if os.fork() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)


@contextlib.contextmanager
def memory(leave: str) -> Iterator[None]:
    """Take memory."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    LIBC.mlockall(3)  # what is there and what will be: nothing goes to a swap
    held: list[mmap.mmap] = []
    while True:
        size = min(available() - int(leave), 64 << 20)
        if size < 1 << 20:
            break
        # Mapped and locked, so the pages are there at once.
        held.append(mmap.mmap(-1, size))
    yield


@contextlib.contextmanager
def cpu(percent: str) -> Iterator[None]:
    """Leave other programs a part of the processors."""
    busy = (1 - float(percent) / 100) * 0.02
    children: list[int] = []
    for number in range(os.cpu_count() or 1):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.sched_setaffinity(0, [number])
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            while True:
                until = time.monotonic() + busy
                while time.monotonic() < until:
                    pass
                time.sleep(0.02 - busy)
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def shift(seconds: float) -> None:
    """Set the wall clock forward, or back."""
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)


@contextlib.contextmanager
def jump(seconds: str) -> Iterator[None]:
    """Set the wall clock forward or back."""
    shift(float(seconds))
    try:
        yield
    finally:
        shift(-float(seconds))


def tick(value: int | None = None) -> int:
    """Set the microseconds by which the clock is advanced a hundred times a second; return those before (adjtimex(2))."""
    words = (ctypes.c_long * 26)()
    LIBC.adjtimex(words)
    before = words[11]
    if value is not None:
        words = (ctypes.c_long * 26)()
        words[0], words[11] = 0x4000, value
        if LIBC.adjtimex(words) < 0:
            raise OSError(ctypes.get_errno(), "adjtimex refused it")
    return int(before)


@contextlib.contextmanager
def rate(factor: str) -> Iterator[None]:
    """Let the wall clock run fast or slow."""
    wall, raw = time.time(), time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
    before = tick(round(10000 * float(factor)))
    try:
        yield
    finally:
        tick(before)
        shift((time.clock_gettime(time.CLOCK_MONOTONIC_RAW) - raw) - (time.time() - wall))


@contextlib.contextmanager
def pause(target: str) -> Iterator[None]:
    """Stop processes."""
    pids = pids_of(target)
    try:
        for pid in pids:
            os.kill(int(pid), signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGCONT)


def unblock() -> None:
    """Let the signal through that ends a fault."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


@contextlib.contextmanager
def syscall(target: str, name: str, error: str, when: str) -> Iterator[None]:
    """Have a system call fail."""
    words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + name]
    words += ["-e", "inject=%s:error=%s%s" % (name, error, when and ":when=" + when)]
    pids = pids_of(target)
    for pid in pids:
        words += ["-p", pid]
    # Ours does not come to this process but by `sigwait`, which a program that is started would inherit.
    tracer = subprocess.Popen(words, stderr=subprocess.PIPE, universal_newlines=True, preexec_fn=unblock)  # noqa: PLW1509 - there are no threads
    try:
        while not all(traced(pid) for pid in pids):
            if tracer.poll() is not None:
                sys.exit("strace could not attach: " + tracer.communicate()[1].strip())
            time.sleep(0.02)
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def traced(pid: str) -> bool:
    """Tell whether a process is traced, or gone."""
    with contextlib.suppress(FileNotFoundError), open("/proc/%s/status" % pid) as file:
        return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in file)
    return True


UNIT_PATIENCE = 10


def timers() -> dict[str, tuple[float, str]]:
    """Return when each timer of systemd that goes by the wall clock elapses, and the unit that it starts."""
    asked = ["systemctl", "show", "--property=Id,Unit,NextElapseUSecRealtime", "*.timer"]
    utc = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
    shown = subprocess.run(asked, check=False, stdout=subprocess.PIPE, universal_newlines=True, env=utc)
    found = {}
    for unit in shown.stdout.split("\n\n"):
        each = dict(line.split("=", 1) for line in unit.splitlines() if line)
        # Others go by how long the system has run, which nothing here changes.
        with contextlib.suppress(ValueError, KeyError):
            due = dt.datetime.strptime(each["NextElapseUSecRealtime"], "%a %Y-%m-%d %H:%M:%S UTC").replace(tzinfo=dt.timezone.utc)
            found[each["Id"]] = (due.timestamp(), each["Unit"])
    return found


def finish(due: float, before: dict[str, tuple[float, str]], slow: set[str]) -> None:
    """Wait until the timers that were due have started their units, and these have ended; once only for those that take long."""
    late = {unit: starts for unit, (when, starts) in before.items() if when <= due and unit not in slow}
    until = time.monotonic() + UNIT_PATIENCE
    while late and time.monotonic() < until:
        now = timers()
        waiting = [unit for unit in late if unit in now and now[unit][0] <= due]
        states = subprocess.run(["systemctl", "is-active", *late.values()], check=False, stdout=subprocess.PIPE, universal_newlines=True)
        if not waiting and not set(states.stdout.split()) & {"activating", "deactivating", "reloading"}:
            # Days pass in seconds, and systemd counts starts by these (StartLimitBurst=). What has failed stays so.
            fine = [unit for unit, state in zip(late.values(), states.stdout.split()) if state != "failed"]
            if fine:
                subprocess.run(["systemctl", "reset-failed", *fine], check=False, stderr=subprocess.DEVNULL)
            return
        time.sleep(0.05)
    slow.update(late)


@contextlib.contextmanager
def forward(seconds: str) -> Iterator[None]:
    """Set the wall clock forward from timer to timer, so that each runs once and in order."""
    slow: set[str] = set()
    began, moved = time.time(), 0.0
    end = began + float(seconds)
    try:
        while time.time() < end:
            now, known = time.time(), timers()
            due = min([end, *(when for when, _ in known.values() if when > now)])
            step = max(0.0, due - time.time()) + 0.001
            shift(step)
            moved += step
            finish(due, known, slow)
        yield
    finally:
        shift(-moved)


FAULTS: dict[str, Callable[..., ContextManager[None]]] = {
    "disk_full": disk_full,
    "inodes_full": inodes_full,
    "memory": memory,
    "cpu": cpu,
    "jump": jump,
    "forward": forward,
    "rate": rate,
    "pause": pause,
    "syscall": syscall,
}


def hold(out: int) -> None:
    """Begin the fault, say so, and wait for the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.setsid()
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    try:
        with FAULTS[sys.argv[2]](*sys.argv[3:]):
            os.write(out, b"began")
            os.close(out)
            signal.sigwait([signal.SIGTERM])
    except (OSError, ValueError, SystemExit) as error:
        with contextlib.suppress(OSError):
            os.write(out, str(error).encode())
        os._exit(1)
    os._exit(0)


reader, writer = os.pipe()
holder = os.fork()
if holder == 0:
    os.close(reader)
    hold(writer)
os.close(writer)
said = b""
while said != b"began":
    piece = os.read(reader, 4096)
    if not piece:
        break
    said += piece
if said != b"began":
    sys.exit(said.decode() or "the process that held the fault was ended")
print(holder)
