"""A recording of a machine's resource figures during a test."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Self

import attrs

from pytest_vmbottle.host.files import atomic_file
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.machine.metrics import GuestSample, Meter, Sample

__all__ = ["Recording", "Statistics"]

_COUNTERS = (
    "read_bytes",
    "write_bytes",
    "guest_disk_read_bytes",
    "guest_disk_write_bytes",
    "guest_network_received_bytes",
    "guest_network_sent_bytes",
)
_RATE = "_per_second"
_CHARTS = {
    "CPU, % of one core": ("cpu_percent", "guest_cpu_percent"),
    "memory, MiB": ("rss_bytes", "guest_memory_used_bytes"),
    "storage, MiB/s": tuple(f"{name}{_RATE}" for name in _COUNTERS[:4]),
    "network, MiB/s": tuple(f"{name}{_RATE}" for name in _COUNTERS[4:]),
}
_SUFFIXES = (".png", ".svg")
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 48
# An answer costs 1/200 of the interval, so 0.5 % of the guest's time; but a chart needs points.
_THRIFT, _AT_LEAST_EVERY = 200.0, 10.0

Series = list[tuple[float, float]]
"""Values with their times, as (seconds, value)."""


@attrs.frozen(kw_only=True)
class Statistics:
    """Maximum, mean and 95th percentile of a figure."""

    max: float
    mean: float
    p95: float


class Recording:
    """Background sampling of a machine for a `with` block, made by `Machine.record`.

    It ends with the block, or with the machine's process. A thread of its own asks the guest, so that a guest that answers late or never
    leaves no gap in the host's figures.

    Attributes:
        samples: The samples in the order of time; the first is taken at the start of the block and the last at its end.
        lost: Whether the machine's process ended before the block did.
    """

    def __init__(self, meter: Meter, *, every: float, guest_every: float | None = None) -> None:
        """Create a recording without starting it.

        Args:
            meter: The source of the samples, used by this recording alone.
            every: Seconds from one sample to the next.
            guest_every: Seconds from an answer of the guest to the next question. By default 200 times what the answer took, but within
                `every` and 10 s: where guests are emulated, answering costs 50 ms of a processor.

        Raises:
            ValueError: A number of seconds is not above 0.
        """
        for name, seconds in (("every", every), ("guest_every", guest_every)):
            # An infinite interval would never end, and NaN compares with nothing.
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name}={seconds!r} is invalid: it must be a number of seconds above 0")
        self.samples: list[Sample] = []
        self.lost = False
        self._meter, self._every, self._guest_every = meter, every, guest_every
        # Only the latest answer counts, and a deque needs no lock between the two threads.
        self._answer: deque[GuestSample] = deque(maxlen=1)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    # -- taking samples --------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start sampling; the `with` statement does it too.

        Raises:
            RuntimeError: The recording has been started before.
        """
        if self._threads:
            raise RuntimeError("a recording can be started only once: call vm.record() for another one")
        # Two threads: a guest that answers late must not delay the host's samples.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch_guest, self._watch_host)]
        # The beginning, before anybody asks the guest: no answer is older than the first sample.
        self._take()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take a last sample and stop; may be called again.

        It takes no longer than the guest does, or may, to answer.
        """
        running = not self._over.is_set()
        # Set before the threads are joined: it wakes both from their waits.
        self._over.set()
        for thread in self._threads:
            thread.join()
        # The last sample has the moment of the end, and the guest's last answer, which its thread took before it ended.
        if running and self._threads:
            self._take()

    def _watch_host(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._every, time.monotonic())  # what was missed is not made up for
            if self._over.wait(due - time.monotonic()) or not self._take():
                return

    def _take(self) -> bool:
        sample = self._meter.host()
        if sample is None:
            # A process that ended ends both threads, although nobody called `stop`.
            self.lost = True
            self._over.set()
            return False
        # Each answer is used once: a guest that has stopped answering must not look as it did before.
        guest = self._answer.pop() if self._answer else None
        self.samples.append(attrs.evolve(sample, guest=guest))
        return True

    def _watch_guest(self) -> None:
        over = False
        while not self.lost:
            began = time.monotonic()
            answer = self._meter.guest()
            if answer is not None:
                self._answer.append(answer)
            # One more answer at the end, so that a short block has two of them: processor time is a difference.
            if over:
                return
            thrifty = min(max(self._every, _THRIFT * (time.monotonic() - began)), _AT_LEAST_EVERY)
            over = self._over.wait(self._guest_every or thrifty)
            if over and answer is None:
                return  # a guest that did not answer last time is not asked again at the end

    # -- what came of it -------------------------------------------------------------------------------------------------------------

    def series(self) -> dict[str, Series]:
        """Return every known figure by name, as (seconds since the first sample, value).

        A counter has also a series of how much it grew per second.

        The names are those of `Sample`; the guest's begin with `guest_`, and rates end with `_per_second`.
        """
        found: dict[str, Series] = {}
        rows = [sample.figures for sample in self.samples]
        origin = self.samples[0].time if self.samples else 0.0
        for name in (name for name in (rows[0] if rows else ()) if name not in {"time", "guest_time"}):
            # The guest answered at another moment than the host's sample was taken, and rates divide by the time in between.
            clock = "guest_time" if name.startswith("guest_") else "time"
            known = [(moment - origin, value) for row in rows if (moment := row[clock]) is not None and (value := row[name]) is not None]
            found[name] = known
            if name in _COUNTERS:
                found[name + _RATE] = _rates(known)
        return {name: values for name, values in found.items() if values}

    @property
    def summary(self) -> dict[str, Statistics]:
        """Return maximum, mean and 95th percentile of every known figure, by name (see `series`)."""
        return {name: _statistics([value for _, value in values]) for name, values in self.series().items()}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the samples as CSV with a header line.

        Unknown figures are empty; counters are as they were read.
        """
        text = io.StringIO()
        fields = list(Sample(time=0).figures)
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sample.figures for sample in self.samples)
        _write(path, text.getvalue().encode())

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write an object with the lists `samples` and `summary`; unknown figures are null."""
        summary = {name: attrs.asdict(statistics) for name, statistics in self.summary.items()}
        samples = [attrs.asdict(sample) for sample in self.samples]
        _write(path, json.dumps({"every": self._every, "samples": samples, "summary": summary}, indent=1).encode())

    def plot(self, path: str | os.PathLike[str] | None = None) -> str:
        """Plot the figures over time.

        Args:
            path: A file that ends with `.png` or `.svg`. It needs matplotlib: `pip install 'pytest-vmbottle[plot]'`.

        Returns:
            The plot for a terminal, a line for each figure.

        Raises:
            ValueError: The file's name has another suffix.
            ImportError: matplotlib is not installed.
        """
        if path is not None:
            suffix = Path(path).suffix.lower()
            if suffix not in _SUFFIXES:
                raise ValueError(f"{os.fspath(path)!r} cannot be plotted to: the name must end with {' or '.join(_SUFFIXES)}")
            _write(path, _draw(self.series(), suffix[1:]))
        return "\n".join(_line(name, values, self._length) for name, values in self.series().items() if name not in _COUNTERS)

    @property
    def _length(self) -> float:
        return self.samples[-1].time - self.samples[0].time if self.samples else 0.0

    def __repr__(self) -> str:
        lost, count = ", ended with the machine's process" if self.lost else "", len(self.samples)
        return f"<Recording: {count} {'sample' if count == 1 else 'samples'} in {self._length:.1f} s{lost}\n{self.plot()}>"


def _rates(known: Series) -> Series:
    """Return the growth per second of a counter, leaving out where it started anew."""
    pairs = itertools.pairwise(known)
    # A counter that is smaller than before was set back by a reboot or a restore, so the difference means nothing.
    return [(then, (value - before) / (then - since)) for (since, before), (then, value) in pairs if then > since and value >= before]


def _statistics(values: list[float]) -> Statistics:
    ordered = sorted(values)
    # The nearest rank, which is always a value that was measured.
    return Statistics(max=ordered[-1], mean=sum(ordered) / len(ordered), p95=ordered[math.ceil(0.95 * len(ordered)) - 1])


def _write(path: str | os.PathLike[str], content: bytes) -> None:
    with atomic_file(Path(path), mode=0o644) as file:
        file.write(content)


def _line(name: str, values: Series, length: float) -> str:
    """Draw a figure as a line of bars, each the maximum of its interval, and its numbers."""
    bins: list[float | None] = [None] * _WIDTH
    for moment, value in values:
        index = min(_WIDTH - 1, max(0, int(_WIDTH * moment / length))) if length else 0
        # The maximum, because a peak is what a reader looks for, and a mean would hide it.
        bins[index] = max(bins[index] or 0.0, value)
    top = max(value or 0.0 for value in bins) or 1.0
    bars = "".join(" " if value is None else _BARS[int((len(_BARS) - 1) * value / top)] for value in bins)
    summed = _statistics([value for _, value in values])
    shown = ", ".join(f"{word} {_shown(name, number)}" for word, number in attrs.asdict(summed).items())
    return f"{name:<42} {bars} {shown}"


def _shown(name: str, value: float) -> str:
    if "bytes" not in name:
        return f"{value:.2f}" if "load" in name else f"{value:.0f}"
    return format_size(int(value)) + ("/s" if name.endswith(_RATE) else "")


def _draw(series: dict[str, Series], kind: str) -> bytes:
    """Draw the charts as an image file."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("plotting to a file needs matplotlib: run `pip install 'pytest-vmbottle[plot]'`") from error
    # Without pyplot, whose global state would belong to the user's own plots and may want a display.
    figure = Figure(figsize=(10, 2.2 * len(_CHARTS)), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(_CHARTS), sharex=True), _CHARTS.items(), strict=True):
        axes.set_ylabel(title)
        for name in (name for name in names if name in series):
            unit = 1 << 20 if "MiB" in title else 1
            axes.plot([moment for moment, _ in series[name]], [value / unit for _, value in series[name]], label=name)
            axes.legend(loc="upper right", fontsize="small")
        axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()
