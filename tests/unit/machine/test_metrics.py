"""What a machine takes, as its process and its guest tell it."""

from __future__ import annotations

import os
import time

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import GuestSample, MachineTimeout, Sample
from pytest_vmbottle.channels.port import Command
from pytest_vmbottle.machine.metrics import Meter

ANSWER = """\
cpu  100 5 45 800 50 0 0 0 0 0
cpu0 50 5 20 400 25 0 0 0 0 0
cpu1 50 0 25 400 25 0 0 0 0 0
intr 12345 1 2 3
ctxt 12
MemTotal:        1000000 kB
MemFree:          100000 kB
MemAvailable:     750000 kB
0.52 0.40 0.10 2/90 1234
   7       0 loop0 10 0 999 0 10 0 999 0 0 0 0 0 0 0 0 0 0
 254       0 vda 100 20 2000 30 200 40 4000 50 0 60 70 0 0 0 0 0 0
 254       1 vda1 90 20 1900 30 200 40 4000 50 0 60 70 0 0 0 0 0 0
 259       0 nvme0n1 1 0 8 0 1 0 16 0 0 0 0 0 0 0 0 0 0
 253       0 dm-0 100 0 2000 0 200 0 4000 0 0 0 0 0 0 0 0 0 0
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  5000      50    0    0    0     0          0         0     5000      50    0    0    0     0       0          0
  ens3: 1500      10    0    0    0     0          0         0     2500      20    0    0    0     0       0          0
enp0s4:500 1 0 0 0 0 0 0 600 1 0 0 0 0 0 0
"""


def meter(*answers: str | Exception) -> Meter:
    rest = list(answers)

    def ask(command: Command) -> bytes:
        assert "/proc/stat" in command.argv
        answer = rest.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer.encode()

    return Meter(os.getpid(), ask)


def test_the_guests_figures_are_those_of_its_kernel_without_what_would_count_twice() -> None:
    before = time.monotonic()
    sample = meter(ANSWER).guest()

    assert sample is not None
    assert before <= sample.time <= time.monotonic()
    assert attrs.asdict(sample) | {"time": 0} == {
        "time": 0,
        "cpu_percent": None,
        "memory_used_bytes": 250_000 << 10,
        "memory_available_bytes": 750_000 << 10,
        "load": 0.52,
        "disk_read_bytes": (2000 + 8) * 512,
        "disk_write_bytes": (4000 + 16) * 512,
        "network_received_bytes": 2000,
        "network_sent_bytes": 3100,
    }


def test_the_guests_processor_time_counts_from_answer_to_answer_and_each_processor_as_100() -> None:
    later = ANSWER.replace("cpu  100 5 45 800 50", "cpu  160 5 60 815 60")  # 75 of 100 ticks, on two processors
    two = meter(ANSWER, later, later)

    assert [sample.cpu_percent for _ in range(3) if (sample := two.guest())] == [None, 150.0, None]


@pytest.mark.parametrize("answer", ["", "cpu  1 2\nMemTotal: lots kB\n", "cat: /proc/stat: No such file\n", "\x00\xff" * 1000])
def test_an_answer_that_makes_no_sense_is_no_sample(answer: str) -> None:
    assert meter(answer).guest() is None


def test_of_a_kernel_that_tells_less_the_rest_is_unknown() -> None:
    sample = meter("\n".join(ANSWER.splitlines()[:8])).guest()

    assert sample is not None
    assert sample.memory_used_bytes == 250_000 << 10
    assert (sample.load, sample.disk_read_bytes, sample.network_sent_bytes) == (None, None, None)


@given(st.text(alphabet=sorted(set(ANSWER)), max_size=2000))
def test_no_answer_is_an_error(answer: str) -> None:
    taker = meter(ANSWER + answer, answer + ANSWER)

    assert isinstance(taker.guest(), GuestSample)
    assert isinstance(taker.guest(), GuestSample)


def test_a_guest_that_does_not_answer_leaves_the_hosts_figures() -> None:
    sample = meter(MachineTimeout("the guest agent does not answer")).sample()

    assert sample is not None
    assert sample.guest is None
    assert sample.rss_bytes


def test_the_hosts_processor_time_counts_from_sample_to_sample() -> None:
    taker = meter()
    first = taker.host()
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    busy = taker.host()
    time.sleep(0.3)
    idle = taker.host()

    assert first is not None
    assert busy is not None
    assert idle is not None
    assert first.cpu_percent is None
    assert (busy.cpu_percent or 0) > (idle.cpu_percent or 0) >= 0
    assert first.time < busy.time < idle.time


def test_a_sample_is_shown_in_sizes_that_people_read_and_what_is_unknown_as_such() -> None:
    guest = GuestSample(time=1, cpu_percent=99.6, memory_used_bytes=190 << 20, memory_available_bytes=790 << 20, load=0.5)
    sample = Sample(time=1, cpu_percent=104.2, rss_bytes=1536 << 20, threads=6, read_bytes=0, guest=guest)

    assert repr(sample) == (
        "<Sample cpu 104 %, rss 1.5 GiB, 6 threads, 0 B read, ? written; guest: cpu 100 %, memory 190 MiB used, 790 MiB available, "
        "load 0.50, disk ? read, ? written, network ? in, ? out>"
    )
    assert repr(Sample(time=1)) == "<Sample cpu ?, rss ?, ? threads, ? read, ? written; guest: unknown>"


def test_the_figures_of_a_sample_have_the_guests_among_them() -> None:
    figures = Sample(time=2, rss_bytes=7, guest=GuestSample(time=1, load=0.5)).figures

    assert (figures["time"], figures["rss_bytes"], figures["guest_time"], figures["guest_load"]) == (2, 7, 1, 0.5)
    assert figures.keys() == Sample(time=3).figures.keys()
