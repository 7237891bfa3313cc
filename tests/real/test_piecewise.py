"""Commands whose output is fetched piece by piece over the guest agent, while nobody is logged in by SSH."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import attrs
import pytest

from pytest_vmbottle import Machine
from pytest_vmbottle.channels.piecewise import PiecewiseProcess
from pytest_vmbottle.host.deadline import Deadline

pytestmark = pytest.mark.vm("debian-12")
LIMIT = 120.0


@attrs.frozen
class Ran:
    """A command with its output so far."""

    process: PiecewiseProcess
    out: bytearray
    err: bytearray
    ended: threading.Event


@contextmanager
def started(vm: Machine, *argv: str) -> Iterator[Ran]:
    out, err, ended = bytearray(), bytearray(), threading.Event()

    def errors(data: bytes) -> None:
        err.extend(data)
        if not data:
            ended.set()

    command = vm.guest.command(argv)
    with closing(PiecewiseProcess(vm.lifecycle.channel, command, stdout=out.extend, stderr=errors)) as process:
        try:
            yield Ran(process, out, err, ended)
        finally:
            vm.guest.kill(command)


def ran(vm: Machine, *argv: str) -> tuple[int | None, bytes, bytes]:
    with started(vm, *argv) as command:
        status = command.process.wait(deadline=Deadline(LIMIT))
        assert command.ended.wait(LIMIT)
        return status, bytes(command.out), bytes(command.err)


def test_a_short_command_gives_its_status_and_both_streams_byte_for_byte(session_vm: Machine) -> None:
    assert ran(session_vm, "sh", "-c", r"printf 'a\0\377'; printf 'b\n' >&2; exit 3") == (3, b"a\0\xff", b"b\n")
    assert ran(session_vm, "true") == (0, b"", b"")
    assert ran(session_vm, "sh", "-c", "kill -TERM $$")[0] == -15


def test_a_program_that_there_is_not_is_told_as_over_other_channels(session_vm: Machine) -> None:
    assert ran(session_vm, "/no/such") == (127, b"", b"/no/such: not found\n")


@pytest.mark.guests
def test_much_output_loses_nothing(session_vm: Machine) -> None:
    status, out, err = ran(session_vm, "bash", "-c", "head -c 5000000 /dev/urandom | tee >(sha256sum >&2)")

    assert (status, len(out)) == (0, 5_000_000)
    assert err.split()[0].decode() == hashlib.sha256(out).hexdigest()


@pytest.mark.guests
def test_many_small_pieces_are_no_end_of_the_output(session_vm: Machine) -> None:
    """Reading them is cut short again and again, of which the guest's tools may warn in between."""
    status, out, err = ran(session_vm, "dd", "if=/dev/zero", "bs=1000", "count=5000", "status=none")

    assert (status, out, err) == (0, bytes(5_000_000), b"")


@pytest.mark.guests
def test_output_comes_while_the_command_runs_and_what_outlives_it_is_waited_for(session_vm: Machine) -> None:
    with started(session_vm, "sh", "-c", "echo first; sleep 3; (sleep 3; echo late) & echo last") as command:
        assert Deadline(LIMIT).poll(lambda: bytes(command.out) == b"first\n", every=0.05)
        assert command.process.returncode is None
        assert command.process.wait(deadline=Deadline(LIMIT)) == 0
    assert bytes(command.out) == b"first\nlast\nlate\n"


@pytest.mark.guests
def test_a_command_that_is_killed_has_ended_and_leaves_nothing_in_the_guest(session_vm: Machine) -> None:
    with started(session_vm, "sh", "-c", "echo begun; sleep 4711") as command:
        assert Deadline(LIMIT).poll(lambda: bytes(command.out) == b"begun\n", every=0.05)
        session_vm.exec(["pkill", "-KILL", "-f", "^sleep 4711"])
        assert command.process.wait(deadline=Deadline(LIMIT)) == -9
    with started(session_vm, "sleep", "4711") as command:
        assert command.process.wait(deadline=Deadline(2)) is None
        session_vm.guest.kill(command.process._command)
        assert command.process.wait(deadline=Deadline(LIMIT)) == -9
    assert session_vm.exec("ls /run/vmbottle-exec-*", check=False).stdout == ""
