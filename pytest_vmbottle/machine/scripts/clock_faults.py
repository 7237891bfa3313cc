"""Faults of a guest's wall clock: steps, another rate, and a way from timer to timer. `hold.py` begins and ends them."""

from __future__ import annotations

import contextlib
import datetime as dt
import glob
import os
import re
import signal
import subprocess
import time
from typing import Iterable, Iterator


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
    import ctypes  # noqa: PLC0415 - not every guest has it

    libc, words = ctypes.CDLL(None, use_errno=True), (ctypes.c_long * 26)()
    libc.adjtimex(words)
    before = words[11]
    if value is not None:
        words = (ctypes.c_long * 26)()
        words[0], words[11] = 0x4000, value
        if libc.adjtimex(words) < 0:
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


MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
NAMES = {name: number for names, low in ((MONTHS, 1), (WEEKDAYS, 0)) for number, name in enumerate(names, low)}
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


def states(units: Iterable[str]) -> list[tuple[str, float, float]]:
    """Return the state of each unit, and when it was started last and when that was tried last, in seconds as of `time.monotonic`."""
    names = ("ActiveState", "InactiveExitTimestampMonotonic", "ConditionTimestampMonotonic")
    asked = ["systemctl", "show", "--property=" + ",".join(names), *units]
    shown = subprocess.run(asked, check=False, stdout=subprocess.PIPE, universal_newlines=True).stdout
    each = [dict(line.split("=", 1) for line in unit.splitlines() if line) for unit in shown.split("\n\n")]
    return [(unit[names[0]], int(unit[names[1]]) / 1e6, int(unit[names[2]]) / 1e6) for unit in each if len(unit) == len(names)]


def is_over(state: str, started: float, tried: float, since: float) -> bool:
    """Tell whether what a timer starts has been started since a moment and has ended, or ran already and so is not started again.

    A timer has no next time, or the next already, while what it has started still runs.
    """
    if state in ("inactive", "failed"):
        return max(started, tried) >= since
    return state == "active" and started < since


def finish(due: float, before: dict[str, tuple[float, str]], slow: set[str], since: float) -> None:
    """Wait until the timers that were due have started their units, and these have ended; once only for those that take long.

    The clock was set at `since`, as of `time.monotonic`.
    """
    late = {unit: starts for unit, (when, starts) in before.items() if when <= due and unit not in slow}
    until = time.monotonic() + UNIT_PATIENCE
    while late and time.monotonic() < until:
        now = timers()
        waiting = [unit for unit in late if unit in now and now[unit][0] <= due]
        found = states(late.values())
        if not waiting and all(is_over(*each, since) for each in found):
            # Days pass in seconds, and systemd counts starts by these (StartLimitBurst=). What has failed stays so.
            fine = [unit for unit, (state, *_) in zip(late.values(), found) if state != "failed"]
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
            since, step = time.monotonic(), max(0.0, due - time.time())
            shift(step)
            moved += step
            if is_cron:
                seen = time.time()
                run_cron()
            finish(due, known, slow, since)
        yield
    finally:
        shift(-moved)
        if crontab:  # cron would pass over the time that it has seen before
            subprocess.run(["systemctl", "--no-block", "try-restart", "cron.service"], check=False, stderr=subprocess.DEVNULL)
