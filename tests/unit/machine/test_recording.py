"""Recordings of processes: the machine's part is played by one that sleeps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_vmbottle import GuestSample, Recording, Sample
from pytest_vmbottle.channels.port import Command
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.machine.metrics import Meter


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.communicate()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def load(value: str = "0.50") -> Callable[[Command], bytes]:
    return lambda _: f"{value} 0 0 1/2 3\n".encode()


def test_a_recording_has_samples_in_order_from_the_beginning_to_the_end(sleeper: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    with Recording(Meter(sleeper.pid, load()), every=0.05) as recording:
        Deadline(30).poll(lambda: len(recording.samples) > 4, every=0.02)
        left = time.monotonic()
    times = [sample.time for sample in recording.samples]

    assert times == sorted(times)
    assert times[0] >= began
    assert times[-1] >= left
    assert recording.samples[0].cpu_percent is None
    assert all(sample.cpu_percent is not None for sample in recording.samples[1:])
    assert not recording.lost


class SlowHost(Meter):
    """A meter on a host that takes its time, with a guest that answers at once."""

    def host(self) -> Sample | None:
        time.sleep(0.1)
        return super().host()


def test_no_answer_of_the_guest_is_older_than_the_first_sample(sleeper: subprocess.Popen[bytes]) -> None:
    with Recording(SlowHost(sleeper.pid, load()), every=0.02) as recording:
        assert Deadline(30).poll(lambda: any(sample.guest for sample in recording.samples), every=0.02)

    assert all(sample.guest.time >= recording.samples[0].time for sample in recording.samples if sample.guest)


def test_a_guest_that_never_answers_leaves_no_gap_in_the_hosts_figures(sleeper: subprocess.Popen[bytes]) -> None:
    answer = threading.Event()

    def hang(_: Command) -> bytes:
        answer.wait(60)
        return b""

    recording = Recording(Meter(sleeper.pid, hang), every=0.02)
    recording.start()
    assert Deadline(30).poll(lambda: len(recording.samples) > 5, every=0.02)
    answer.set()
    recording.stop()
    assert [sample.guest for sample in recording.samples] == [None] * len(recording.samples)


def test_a_short_recording_has_two_answers_of_the_guest_so_that_its_processor_time_is_known(sleeper: subprocess.Popen[bytes]) -> None:
    with Recording(Meter(sleeper.pid, load()), every=60) as recording:
        assert Deadline(30).poll(lambda: recording.samples, every=0.01)
    assert [sample.guest.load for sample in recording.samples if sample.guest][-1] == 0.5
    assert len(recording.samples) == 2


def test_a_machine_that_dies_ends_its_recording_which_keeps_what_it_has(sleeper: subprocess.Popen[bytes]) -> None:
    with Recording(Meter(sleeper.pid, load()), every=0.05, guest_every=60) as recording:
        assert Deadline(30).poll(lambda: recording.samples, every=0.01)
        sleeper.kill()
        sleeper.wait()
        assert Deadline(30).poll(lambda: recording.lost, every=0.02)
        count = len(recording.samples)
    assert len(recording.samples) == count > 0
    assert "ended" in repr(recording)


def test_a_recording_stops_twice_and_does_not_start_twice(sleeper: subprocess.Popen[bytes]) -> None:
    recording = Recording(Meter(sleeper.pid, load()), every=0.05)
    recording.stop()
    assert recording.samples == []
    other = Recording(Meter(sleeper.pid, load()), every=0.05)
    with other:
        pass
    other.stop()
    with pytest.raises(RuntimeError, match="recording"):
        other.start()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_intervals_that_make_no_sense_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="every="):
        Recording(Meter(1, load()), every=seconds)
    with pytest.raises(ValueError, match="guest_every="):
        Recording(Meter(1, load()), every=1, guest_every=seconds)


@pytest.fixture
def recording() -> Recording:
    """Twenty seconds in which the guest told its figures twice, and began to count anew in between."""
    made = Recording(Meter(1, load()), every=1.0)
    for second in range(20):
        guest = {0: GuestSample(time=100.0, disk_write_bytes=7 << 20), 10: GuestSample(time=110.0, cpu_percent=50.0, disk_write_bytes=5)}
        cpu = None if second == 0 else float(second)
        made.samples.append(
            Sample(time=100.0 + second, cpu_percent=cpu, rss_bytes=1 << 20, threads=3, read_bytes=second * 2048, guest=guest.get(second))
        )
    return made


def test_the_summary_has_the_largest_value_the_mean_and_the_95th_percentile(recording: Recording) -> None:
    summary = recording.summary

    assert (summary["cpu_percent"].max, summary["cpu_percent"].mean, summary["cpu_percent"].p95) == (19, 10, 19)
    assert (summary["read_bytes"].max, summary["read_bytes"].p95) == (19 * 2048, 18 * 2048)
    assert (summary["guest_cpu_percent"].max, summary["guest_cpu_percent"].mean) == (50, 50)
    assert "write_bytes" not in summary


def test_counters_come_as_rates_too_but_not_where_they_began_anew(recording: Recording) -> None:
    series = recording.series()

    assert series["read_bytes_per_second"] == [(float(second), 2048.0) for second in range(1, 20)]
    assert "guest_disk_write_bytes_per_second" not in series


def test_files_have_every_sample(recording: Recording, tmp_path: Path) -> None:
    recording.to_csv(tmp_path / "r.csv")
    recording.to_json(tmp_path / "r.json")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    record = json.loads((tmp_path / "r.json").read_text())

    assert [float(row["time"]) for row in rows] == [sample.time for sample in recording.samples]
    assert (rows[0]["cpu_percent"], rows[1]["cpu_percent"], rows[10]["guest_cpu_percent"]) == ("", "1.0", "50.0")
    assert record["samples"][10]["guest"]["disk_write_bytes"] == 5
    assert record["samples"][1]["guest"] is None
    assert record["summary"]["cpu_percent"] == {"max": 19, "mean": 10, "p95": 19}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.json"]


def test_plots_are_images_of_the_kind_that_the_name_says(recording: Recording, tmp_path: Path) -> None:
    recording.plot(tmp_path / "r.png")
    recording.plot(str(tmp_path / "r.svg"))

    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "<svg" in (tmp_path / "r.svg").read_text()
    with pytest.raises(ValueError, match=r"\.svg"):
        recording.plot(tmp_path / "r.txt")


def test_a_plot_to_a_file_says_what_it_takes_where_that_is_missing(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pytest-vmbottle\[plot\]"):
        recording.plot(tmp_path / "r.png")

    assert list(tmp_path.iterdir()) == []


def test_the_plot_for_a_terminal_has_a_line_for_each_figure(recording: Recording) -> None:
    lines = {line.split()[0]: line for line in recording.plot().splitlines()}

    assert lines["cpu_percent"].endswith("max 19, mean 10, p95 19")
    assert lines["rss_bytes"].endswith("max 1.0 MiB, mean 1.0 MiB, p95 1.0 MiB")
    assert lines["read_bytes_per_second"].endswith("p95 2.0 KiB/s")
    assert lines["cpu_percent"].index("▁") < lines["cpu_percent"].index("█")


def test_a_recording_of_nothing_has_nothing_to_show() -> None:
    empty = Recording(Meter(1, load()), every=1)

    assert (empty.summary, empty.plot()) == ({}, "")
    assert repr(empty).startswith("<Recording: 0 samples in 0.0 s")
