"""Faults of what a guest has: its file systems, its memory, its processors, its processes. `hold.py` begins and ends them."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Iterator

PAGE = 4096


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


def kept_back(path: str) -> int:
    """Return the bytes that a file system counts as free and gives to nobody: ext4 keeps some for its own use."""
    device = "%d:%d" % (os.major(os.stat(path).st_dev), os.minor(os.stat(path).st_dev))
    with open("/proc/self/mountinfo") as file:
        kinds = {line.split()[2]: line.partition(" - ")[2].split()[0] for line in file}
    # What an overlay lies upon is not told: at worst more is left than is asked for.
    names = {"ext4": os.path.basename(os.path.realpath("/sys/dev/block/" + device)), "overlay": "*"}
    most = 0
    for name in glob.glob("/sys/fs/ext4/%s/reserved_clusters" % names.get(kinds.get(device, ""), "none")):
        with open(name) as file:
            most = max(most, int(file.read()))
    return most * os.statvfs(path).f_frsize


@contextlib.contextmanager
def disk_full(path: str, leave: str) -> Iterator[None]:
    """Fill a file system."""
    least = int(leave) + kept_back(path)
    name = os.path.join(path, ".vmbottle-full-%d" % os.getpid())
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        at, size = 0, 1 << 40
        while size >= PAGE:
            free = os.statvfs(path)
            room = free.f_bfree * free.f_frsize - least
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
    import ctypes  # noqa: PLC0415 - not every guest has it
    import mmap  # noqa: PLC0415

    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    ctypes.CDLL(None).mlockall(3)  # what is there and what will be: nothing goes to a swap
    held: list[mmap.mmap] = []
    while True:
        size = min(available() - int(leave), 64 << 20)
        if size < 1 << 20:
            break
        # Mapped and locked, so the pages are there at once.
        held.append(mmap.mmap(-1, size))
    yield
    # Here, since a process is seen to have ended before all of its memory is free.
    for each in held:
        each.close()


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
