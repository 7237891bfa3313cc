"""Holds a fault in a guest: python3 -c SCRIPT TOKEN FAULT ARGUMENT...; it prints its process id when the fault has begun.

The fault ends, and with it the process that holds it, by SIGTERM.
"""

from __future__ import annotations

import calendar
import contextlib
import ctypes
import datetime as dt
import errno
import glob
import mmap
import os
import re
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


MONTHS, WEEKDAYS = calendar.month_abbr[1:], ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
NAMES = {name.lower(): number for names, low in ((MONTHS, 1), (WEEKDAYS, 0)) for number, name in enumerate(names, low)}
SHORT = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0", "@monthly": "0 0 1 * *"}
SHORT["@yearly"] = SHORT["@annually"] = "0 0 1 1 *"
LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
UNIT_PATIENCE = 10
CRON_LATE = 2.0  # it sleeps until a second after its minute has begun (cron_sleep in Debian's cron.c)


def field(text: str, low: int, high: int) -> set[int]:
    """Return the numbers of a field of a crontab (crontab(5))."""
    found: set[int] = set()
    for part in text.lower().split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        if span == "*":
            first, last = str(low), str(high)
        begin = NAMES[first] if first in NAMES else int(first)
        end = NAMES[last] if last in NAMES else int(last or (high if step else begin))
        found.update(range(begin, end + 1, int(step or 1)))
    return found


class Job:
    """A line of a crontab."""

    def __init__(self, line: str) -> None:
        """Read the line."""
        words = line.split()
        words = (SHORT.get(words[0], words[0]) if words[0].startswith("@") else " ".join(words[:5])).split()
        self.minutes, self.hours, self.days, self.months, weekdays = (field(word, *limits) for word, limits in zip(words, LIMITS))
        self.weekdays = {number % 7 for number in weekdays}
        # With a star in one of the two, both must fit; else one of them is enough.
        self.both = words[2].startswith("*") or words[4].startswith("*")

    def falls_on(self, day: dt.date) -> bool:
        """Tell whether the job runs on a day."""
        fits = (day.day in self.days, day.isoweekday() % 7 in self.weekdays)
        return day.month in self.months and (all(fits) if self.both else any(fits))

    def after(self, now: float, end: float) -> float:
        """Return the next time at which it runs; `end` if that is later."""
        day = dt.datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)  # noqa: DTZ006 - cron goes by local time
        while day.timestamp() < end:
            if self.falls_on(day.date()):
                for hour in sorted(self.hours):
                    for minute in sorted(self.minutes):
                        due = day.replace(hour=hour, minute=minute).timestamp()
                        if due > now:
                            return min(due, end)
            day += dt.timedelta(days=1)
        return end


def jobs() -> list[Job]:
    """Return the jobs of cron."""
    found = []
    for path in ["/etc/crontab", *glob.glob("/etc/cron.d/*"), *glob.glob("/var/spool/cron/crontabs/*")]:
        with contextlib.suppress(OSError), open(path, errors="replace") as file:
            for line in file:
                # Neither comments nor variables; what cron itself does not understand is not run either.
                if re.match(r"\s*[\d*@]", line):
                    with contextlib.suppress(ValueError, IndexError):
                        found.append(Job(line))
    return found


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


def cron() -> list[str]:
    """Return the processes of cron, without those that it has started for jobs."""
    found = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            text = file.read()
            if text[text.index("(") + 1 : text.rindex(")")] in ("cron", "crond"):
                found[text.split()[0]] = text.rpartition(")")[2].split()[1]
    return [pid for pid, parent in found.items() if parent not in found]


def slept(pid: str) -> int:
    """Return how often a process has gone to sleep, if it sleeps and has started nothing that still runs; else -1."""
    try:
        with open("/proc/%s/wchan" % pid) as where, open("/proc/%s/task/%s/children" % (pid, pid)) as children:
            if "nanosleep" not in where.read() or children.read():
                return -1
        with open("/proc/%s/status" % pid) as status:
            return int(status.read().rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
    except OSError:
        return -1


def run_cron() -> None:
    """Have cron look at the clock, and wait until it and what it starts have done their work.

    It sleeps up to a minute. A signal wakes it, and then it sees how long it has slept by the clock.
    """
    before = {pid: slept(pid) for pid in cron()}
    for pid in before:
        os.kill(int(pid), signal.SIGCHLD)
    until = time.monotonic() + UNIT_PATIENCE
    while any(slept(pid) <= times for pid, times in before.items()) and time.monotonic() < until:
        time.sleep(0.02)


@contextlib.contextmanager
def forward(seconds: str) -> Iterator[None]:
    """Set the wall clock forward from timer to timer, so that each runs once and in order."""
    slow: set[str] = set()
    began, moved = time.time(), 0.0
    end, crontab = began + float(seconds), jobs() if cron() else []
    seen = began  # by cron
    try:
        while time.time() < end:
            now, known = time.time(), timers()
            by_cron = min([end, *(job.after(seen, end) for job in crontab)])
            due = min([end, *(when for when, _ in known.values() if when > now)])
            is_cron = by_cron <= due and by_cron < end
            due = by_cron + CRON_LATE if is_cron else due + 0.001
            step = max(0.0, due - time.time())
            shift(step)
            moved += step
            if is_cron:
                seen = time.time()
                run_cron()
            finish(due, known, slow)
        yield
    finally:
        shift(-moved)
        if crontab:  # cron would pass over the time that it has seen before
            subprocess.run(["systemctl", "--no-block", "try-restart", "cron.service"], check=False, stderr=subprocess.DEVNULL)


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
