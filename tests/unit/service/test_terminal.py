"""The protocol of the terminal, and a whole session with a program of this computer in place of a guest's shell."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from starlette.websockets import WebSocket

from pytest_vmbottle.channels.port import Terminal
from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.service.problems import Problem
from pytest_vmbottle.service.terminal import Terminals, control_of


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("ctrlc", {"type": "ctrlc"}),
        ('{"type": "ctrld"}', {"type": "ctrld"}),
        ('{"type": "resize", "columns": 132, "rows": 43}', {"type": "resize", "columns": 132, "rows": 43}),
    ]
    + [
        (text, None)
        for text in ("ls\n", "CTRLC", "ctrlc ", "{", "{}", '{"type": "other"}', "[1]", "{" * 100_000, '{"type": ["ctrlc"]}'[:0], "")
    ]
    + [
        (f'{{"type": "resize", "columns": {columns}, "rows": 24}}', None)
        for columns in ("0", "1001", "-1", "true", "null", '"80"', "80.0", "1e400", "1" * 5000)
    ],
)
def test_only_what_is_exactly_a_control_message_is_not_typed(text: str, control: Any) -> None:
    assert control_of(text) == control


_HEEDS_CTRL_C = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


class LocalTerminal(Terminal):
    """A program of this computer on a terminal."""

    def __init__(self, *argv: str) -> None:
        self._end, its = pty.openpty()
        # `setsid` gives the program the terminal, so that Ctrl-C on it is a signal.
        # A shell starts what runs in the background with SIGINT ignored, and everything below that inherits it.
        argv = ("python3", "-c", _HEEDS_CTRL_C, *argv)
        self.process = subprocess.Popen(["setsid", "--ctty", *argv], stdin=its, stdout=its, stderr=its)
        os.close(its)
        self.closed = False

    def fileno(self) -> int:
        return self._end

    def receive(self) -> bytes:
        with suppress(OSError):
            return os.read(self._end, 4096)
        return b""

    def send(self, data: bytes) -> None:
        os.write(self._end, data)

    def resize(self, columns: int, lines: int) -> None:
        import termios

        termios.tcsetwinsize(self._end, (lines, columns))

    @property
    def status(self) -> int | None:
        return self.process.wait(10)

    def close(self) -> None:
        if not self.closed:
            os.close(self._end)
            self.closed = True
        self.process.kill()
        self.process.wait()


@pytest.fixture
def shell() -> Iterator[LocalTerminal]:
    shell = LocalTerminal("/bin/sh", "-c", "echo ready; exec cat")
    yield shell
    shell.close()


class Client:
    """The far end of a WebSocket: it sends its messages one by one, each when something is on its screen."""

    def __init__(self, *script: tuple[str, Any]) -> None:
        self.script = list(script)
        self.screen = b""
        self.sent: list[dict[str, Any]] = []
        self.seen = asyncio.Event()

    async def receive(self) -> Any:
        if not self.sent and not any(each["type"] == "websocket.accept" for each in self.sent):
            return {"type": "websocket.connect"}
        if not self.script:
            await asyncio.Event().wait()
        until, what = self.script.pop(0)
        while until.encode() not in self.screen:
            self.seen.clear()
            await self.seen.wait()
        self.screen = b""
        if what is None:
            return {"type": "websocket.disconnect", "code": 1006}
        return {"type": "websocket.receive", ("text" if isinstance(what, str) else "bytes"): what}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.screen += message.get("bytes") or b""
        self.seen.set()

    def run(self, terminals: Terminals, opened: Any, subprotocols: list[str] | None = None) -> None:
        scope = {"type": "websocket", "subprotocols": subprotocols or [], "headers": [], "path": "/"}
        asyncio.run(asyncio.wait_for(terminals.serve(WebSocket(scope, self.receive, self.send), opened), 30))


def test_frames_of_both_kinds_are_typed_and_the_status_comes_before_the_end(shell: LocalTerminal) -> None:
    client = Client(("ready", "in text\n"), ("in text", b"in bytes\n"), ("in bytes", "ctrld"))
    client.run(Terminals(), lambda: shell, ["vmbottle.bearer.secret", "vmbottle.tty"])

    assert client.sent[0]["subprotocol"] == "vmbottle.tty"
    assert client.sent[-2]["text"] == '{"type": "exit", "status": 0}'
    assert client.sent[-1] == {"type": "websocket.close", "code": 1000, "reason": ""}
    assert shell.closed


def test_ctrl_c_reaches_the_program(shell: LocalTerminal) -> None:
    client = Client(("ready", '{"type": "ctrlc"}'))
    client.run(Terminals(), lambda: shell)

    assert client.sent[-2]["text"] == '{"type": "exit", "status": -2}'


def test_the_size_of_the_window_reaches_the_program() -> None:
    shell = LocalTerminal("/bin/sh", "-c", "echo ready; read line; stty size")
    client = Client(("ready", '{"type": "resize", "columns": 132, "rows": 43}'), ("", "\n"))
    client.run(Terminals(), lambda: shell)

    assert b"43 132" in b"".join(each.get("bytes") or b"" for each in client.sent)


def test_the_shell_ends_with_the_socket(shell: LocalTerminal) -> None:
    client = Client(("ready", None))
    client.run(Terminals(), lambda: shell)

    assert shell.closed
    assert shell.process.returncode in (-signal.SIGHUP, -signal.SIGKILL)


def test_a_client_that_takes_nothing_holds_the_output_up_and_nothing_else() -> None:
    shell = LocalTerminal("/usr/bin/yes")
    taken = 0

    class Slow(Client):
        async def send(self, message: Any) -> None:
            nonlocal taken
            self.sent.append(message)
            if message["type"] == "websocket.send":
                taken += len(message.get("bytes") or b"")
                if taken > 10_000:
                    await asyncio.Event().wait()

        async def receive(self) -> Any:
            if not self.sent:
                return {"type": "websocket.connect"}
            await asyncio.sleep(0.5)
            return {"type": "websocket.disconnect", "code": 1006}

    Slow().run(Terminals(), lambda: shell)

    assert taken < 20_000
    assert shell.closed


def test_no_more_terminals_than_so_many_are_open() -> None:
    client = Client()
    with pytest.raises(Problem, match="0 terminals are open"):
        client.run(Terminals(0), lambda: pytest.fail("it was opened"))

    assert client.sent == []


def test_a_terminal_that_cannot_be_opened_is_told_before_the_handshake() -> None:
    def fail() -> Terminal:
        raise MachineError("the machine 'web' is off")

    client = Client()
    with pytest.raises(MachineError, match="is off"):
        client.run(Terminals(), fail)

    assert client.sent == []
