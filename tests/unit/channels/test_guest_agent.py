"""The guest agent's line, with an agent of our own at its other end that answers as it is told."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from pytest_vmbottle.channels import guest_agent
from pytest_vmbottle.channels.guest_agent import AgentEnded, AgentRefused, GuestAgent
from pytest_vmbottle.channels.port import MAX_OUTPUT, Command
from pytest_vmbottle.errors import MachineDied, MachineTimeout
from pytest_vmbottle.host.deadline import Deadline

Answer = Callable[[str, dict[str, Any]], bytes]


class Peer:
    """Guest end of the agent's socket, which answers as a healthy agent by default."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.answer: Answer = self.healthy
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def healthy(self, name: str, arguments: dict[str, Any]) -> bytes:
        answers: dict[str, Any] = {
            "guest-sync-delimited": arguments.get("id"),
            "guest-exec": {"pid": 7},
            "guest-file-open": 1000,
            "guest-exec-status": {"exited": True, "exitcode": 0, "out-data": base64.b64encode(b"out").decode()},
        }
        prefix = b"\xff" if name == "guest-sync-delimited" else b""
        return prefix + json.dumps({"return": answers.get(name, {})}).encode() + b"\n"

    def _serve(self) -> None:
        with self._theirs, self._theirs.makefile("rb") as lines, suppress(OSError):
            for line in lines:
                request = json.loads(line.replace(b"\xff", b""))
                self._theirs.sendall(self.answer(request["execute"], request.get("arguments", {})))

    def hang_up(self) -> None:
        with suppress(OSError):
            self._theirs.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def close(self) -> None:
        self.ours.close()
        self._thread.join()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@pytest.fixture
def agent(peer: Peer) -> GuestAgent:
    return GuestAgent(peer.ours, alive=lambda: None)


def run(agent: GuestAgent, seconds: float = 5) -> bytes:
    return agent.run(Command(argv=("true",)), deadline=Deadline(seconds)).stdout


def test_an_answer_that_came_too_late_is_not_taken_for_the_next_one(peer: Peer, agent: GuestAgent) -> None:
    def late(name: str, arguments: dict[str, Any]) -> bytes:
        if name == "guest-ping":
            time.sleep(0.4)
            return b'{"return": {"pid": 666}}\n'
        return peer.healthy(name, arguments)

    peer.answer = late
    with pytest.raises(MachineTimeout, match="guest-ping"):
        agent.call("guest-ping", deadline=Deadline(0.1))
    assert agent.call("guest-exec", deadline=Deadline(60)) == {"pid": 7}


def test_ctrl_c_in_the_middle_of_an_answer_does_not_shift_the_ones_after_it(peer: Peer) -> None:
    def interrupted() -> None:
        if peer.answer is slow:
            raise KeyboardInterrupt

    def slow(name: str, arguments: dict[str, Any]) -> bytes:
        time.sleep(0.7)
        return peer.healthy(name, arguments)

    agent = GuestAgent(peer.ours, alive=interrupted)
    peer.answer = slow
    with pytest.raises(KeyboardInterrupt):
        agent.call("guest-ping", deadline=Deadline(60))
    peer.answer = peer.healthy
    assert run(agent) == b"out"


def test_a_conversation_begins_anew_after_the_rest_of_an_older_one(peer: Peer, agent: GuestAgent) -> None:
    peer.answer = lambda name, arguments: b'half an answer"}\n{"return": 1}\n' + peer.healthy(name, arguments)
    agent.sync(deadline=Deadline(60))
    peer.answer = peer.healthy
    assert run(agent) == b"out"


def test_a_guest_that_does_not_answer_is_a_time_out(peer: Peer, agent: GuestAgent) -> None:
    peer.answer = lambda *_: b""
    with pytest.raises(MachineTimeout):
        agent.sync(deadline=Deadline(0.2))


@pytest.mark.parametrize("nonsense", [b"\n", b"{\n", b"null\n", b"[]\n", b'"x"\n', b'{"other": 1}\n', b"\xfe\xfd\n", b'{"error": 1}\n'])
def test_an_answer_that_makes_no_sense_is_a_lost_machine(peer: Peer, agent: GuestAgent, nonsense: bytes) -> None:
    peer.answer = lambda *_: nonsense
    with pytest.raises(MachineDied):
        agent.call("guest-ping", deadline=Deadline(60))


@pytest.mark.parametrize(("enabled", "runs"), [(True, True), (False, False)])
def test_an_agent_that_is_forbidden_to_run_commands_is_found_out(peer: Peer, agent: GuestAgent, *, enabled: bool, runs: bool) -> None:
    listed = [{"name": "guest-exec", "enabled": enabled}, {"name": "guest-exec-status", "enabled": True}]
    told = json.dumps({"return": {"version": "9.0.0", "supported_commands": listed}}).encode() + b"\n"
    peer.answer = lambda name, arguments: told if name == "guest-info" else peer.healthy(name, arguments)
    assert agent.runs_commands(deadline=Deadline(60)) is runs


def test_an_agent_that_does_not_tell_what_it_may_do_is_a_lost_machine(agent: GuestAgent) -> None:
    with pytest.raises(MachineDied, match="guest-info"):
        agent.runs_commands(deadline=Deadline(60))


def test_an_error_of_the_agents_is_told_in_its_words(peer: Peer, agent: GuestAgent) -> None:
    peer.answer = lambda *_: b'{"error": {"class": "GenericError", "desc": "not today"}}\n'
    with pytest.raises(AgentRefused, match="not today"):
        agent.call("guest-ping", deadline=Deadline(60))


def test_an_answer_without_an_end_is_not_kept_in_memory_for_ever(peer: Peer, agent: GuestAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "_MAX_REPLY", 100_000)
    peer.answer = lambda *_: b"x" * 1_000_000
    with pytest.raises(MachineDied, match="100000"):
        agent.call("guest-ping", deadline=Deadline(60))


def test_a_line_that_is_closed_gives_the_hypervisors_end_a_moment_to_say_more(peer: Peer) -> None:
    seen: list[float] = []

    def alive() -> None:
        seen.append(time.monotonic())
        if len(seen) > 2:
            raise MachineDied("QEMU ended with status 3")

    peer.hang_up()
    with pytest.raises(MachineDied, match="status 3"):
        GuestAgent(peer.ours, alive=alive).call("guest-ping", deadline=Deadline(60))


def test_a_program_that_is_not_there_is_the_status_127_and_one_that_may_not_run_126(peer: Peer, agent: GuestAgent) -> None:
    for text, status in (("No such file or directory", 127), ("Permission denied", 126)):
        peer.answer = lambda *_, text=text: json.dumps({"error": {"desc": f"Failed to execute child process: {text}"}}).encode() + b"\n"
        assert agent.run(Command(argv=("thing",)), deadline=Deadline(60)).returncode == status


def test_each_command_is_started_as_a_login_of_its_own_by_an_agent_that_was_set_apart_once(peer: Peer, agent: GuestAgent) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def noted(name: str, arguments: dict[str, Any]) -> bytes:
        asked.append((name, arguments))
        return peer.healthy(name, arguments)

    peer.answer = noted
    commands = [Command(argv=("true",)), Command(argv=("true",))]
    for command in commands:
        agent.run(command, deadline=Deadline(60))

    assert [each["path"] for name, each in asked if name == "guest-exec"] == ["/bin/sh", "true", "true"]
    written = [base64.b64decode(each["buf-b64"]).decode() for name, each in asked if name == "guest-file-write"]
    assert written == [command.tag for command in commands]
    assert [each["path"] for name, each in asked if name == "guest-file-open"] == ["/proc/self/loginuid"]


def test_an_agent_that_may_not_write_files_runs_commands_all_the_same(peer: Peer, agent: GuestAgent) -> None:
    def forbidding(name: str, arguments: dict[str, Any]) -> bytes:
        return b'{"error": {"desc": "disabled"}}\n' if name.startswith("guest-file") else peer.healthy(name, arguments)

    peer.answer = forbidding
    assert run(agent) == run(agent) == b"out"


def test_a_command_whose_agent_is_another_one_by_now_is_lost_and_the_machine_is_not(peer: Peer, agent: GuestAgent) -> None:
    def forgetful(name: str, arguments: dict[str, Any]) -> bytes:
        unknown = name == "guest-exec-status" and arguments["pid"] == 7 and forgets
        return b'{"error": {"desc": "Invalid parameter \'pid\'"}}\n' if unknown else peer.healthy(name, arguments)

    forgets = False
    peer.answer = forgetful
    run(agent)
    forgets = True
    with pytest.raises(AgentEnded) as caught:
        run(agent)
    assert not isinstance(caught.value, MachineDied)


def test_an_agent_that_is_stopped_is_not_waited_for(peer: Peer) -> None:
    changes = 0

    def stopping(name: str, arguments: dict[str, Any]) -> bytes:
        nonlocal changes
        if name != "guest-exec-status" or not stops:
            return peer.healthy(name, arguments)
        changes += 1
        return b""

    stops = False
    peer.answer = stopping
    agent = GuestAgent(peer.ours, alive=lambda: None, changes=lambda: changes)
    run(agent)
    stops = True
    with pytest.raises(AgentEnded):
        run(agent, seconds=300)
    stops = False
    assert run(agent) == b"out"


@pytest.mark.parametrize(("ending", "outlived"), [({"signal": 9}, False), ({"exitcode": 0}, True), ({"exitcode": 137}, True)])
def test_at_a_deadline_a_command_that_had_ended_is_told_from_one_that_was_killed(
    peer: Peer, agent: GuestAgent, ending: dict[str, int], *, outlived: bool
) -> None:
    begun: list[str] = []

    def lingering(name: str, arguments: dict[str, Any]) -> bytes:
        if name == "guest-exec":
            begun.append(arguments["path"])
            return json.dumps({"return": {"pid": len(begun)}}).encode() + b"\n"
        if name == "guest-exec-status" and arguments["pid"] == 2:  # the first has set the agent apart, the third kills
            return json.dumps({"return": {"exited": len(begun) > 2, **(ending if len(begun) > 2 else {})}}).encode() + b"\n"
        return peer.healthy(name, arguments)

    peer.answer = lingering
    finished = agent.run(Command(argv=("thing",)), deadline=Deadline(0.05))
    assert (finished.timed_out, finished.returncode, finished.outlived) == (True, -9, outlived)


def test_an_answer_that_is_nested_without_end_is_a_lost_machine(peer: Peer, agent: GuestAgent) -> None:
    peer.answer = lambda *_: b"[" * 100_000 + b"\n"
    with pytest.raises(MachineDied):
        agent.call("guest-ping", deadline=Deadline(60))


_HOSTILE: list[Any] = [[], {}, None, "text", 7, {"pid": "7"}, {"pid": -1}, {"pid": 10**30}, {"exited": True, "exitcode": "zero"}]
_HOSTILE += [{"exited": True, "exitcode": 10**30}, {"exited": True, "signal": []}, {"exited": True, "out-data": "%%%"}]
_HOSTILE += [{"exited": True, "out-data": 7}, {"exited": True, "err-data": {}}, {"exited": True, "exitcode": 1.5}]


@pytest.mark.parametrize("asked", ["guest-exec", "guest-exec-status"])
@pytest.mark.parametrize("hostile", _HOSTILE, ids=lambda each: json.dumps(each)[:40])
def test_an_answer_of_the_wrong_form_is_a_lost_machine_or_a_result_and_nothing_else(
    peer: Peer, agent: GuestAgent, asked: str, hostile: object
) -> None:
    def answer(name: str, arguments: dict[str, Any]) -> bytes:
        return json.dumps({"return": hostile}).encode() + b"\n" if name == asked else peer.healthy(name, arguments)

    peer.answer = answer
    with pytest.raises(MachineDied):
        run(agent)


def test_an_answer_of_a_million_parts_is_a_lost_machine_before_it_is_read(peer: Peer, agent: GuestAgent) -> None:
    peer.answer = lambda *_: b'{"return": [' + b"[]," * 1_000_000 + b"0]}\n"
    with pytest.raises(MachineDied, match="guest-ping"):
        agent.call("guest-ping", deadline=Deadline(60))


def test_more_output_than_an_agent_may_send_is_cut_and_said_to_be(peer: Peer, agent: GuestAgent) -> None:
    much = base64.b64encode(bytes(MAX_OUTPUT + 3)).decode()

    def answer(name: str, arguments: dict[str, Any]) -> bytes:
        if name != "guest-exec-status":
            return peer.healthy(name, arguments)
        return json.dumps({"return": {"exited": True, "exitcode": 0, "out-data": much}}).encode() + b"\n"

    peer.answer = answer
    finished = agent.run(Command(argv=("thing",)), deadline=Deadline(60))
    assert finished.truncated
    assert len(finished.stdout) == MAX_OUTPUT
