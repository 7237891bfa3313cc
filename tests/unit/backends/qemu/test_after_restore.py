"""What is asked of the process that waits in a guest for its restore."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from pytest_vmbottle import MachineError, Unsupported
from pytest_vmbottle.backends.qemu.after_restore import AfterRestore
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.package_data import read_script


@pytest.fixture
def there() -> list[bool]:
    """Whether the process has its port open, as the only element."""
    return [False]


@pytest.fixture
def ends(there: list[bool]) -> Iterator[tuple[AfterRestore, socket.socket]]:
    """The host's end, and the guest's."""
    ours, its = socket.socketpair()
    asking = AfterRestore(ours, lambda: there[0])
    yield asking, its
    asking.close()
    its.close()


def answering(its: socket.socket, *answers: bytes) -> list[bytes]:
    """Answer as a guest does, which does what it is told by its own program; return what was asked."""
    asked: list[bytes] = []

    def answer() -> None:
        for each in answers:
            line = its.makefile("rb").readline()
            asked.append(line)
            its.sendall(each)

    threading.Thread(target=answer, daemon=True).start()
    return asked


def test_a_program_is_run_in_a_guest_that_has_the_process_and_in_no_other(
    ends: tuple[AfterRestore, socket.socket], there: list[bool]
) -> None:
    asking, its = ends
    with pytest.raises(Unsupported, match="after-restore"):
        asking.do("answer = 1", deadline=Deadline(5))
    there[0] = True
    asked = answering(its, b"nonce\n", b"it is 1\n")
    asking.wake("nonce", deadline=Deadline(5))
    assert asking.do("answer = 'it is 1'", deadline=Deadline(5)) == "it is 1"
    verb, program = asked[1].split()
    assert (verb, bytes.fromhex(program.decode())) == (b"do", b"answer = 'it is 1'")
    there[0] = False  # the guest has booted again
    with pytest.raises(Unsupported):
        asking.do("answer = 1", deadline=Deadline(5))


def test_a_process_that_did_not_answer_in_time_is_asked_nothing_more(ends: tuple[AfterRestore, socket.socket], there: list[bool]) -> None:
    asking, its = ends
    there[0] = True
    answering(its, b"nonce\n")
    asking.wake("nonce", deadline=Deadline(5))
    with pytest.raises(MachineError, match="does not answer"):
        asking.do("while True: pass", deadline=Deadline(0.2))
    its.sendall(b"late\n")
    with pytest.raises(Unsupported):
        asking.do("answer = 1", deadline=Deadline(5))


def test_what_goes_wrong_in_a_program_is_its_answer_and_the_process_stays() -> None:
    text = read_script("pytest_vmbottle.backends.qemu", "after_restore.py")
    names: dict[str, object] = {}
    exec(text[text.index("def do(") : text.index("while True:")], names)
    do = names["do"]
    assert callable(do)
    answers = [do(program.encode().hex().encode()).decode() for program in ("answer = 1 + 1", "1 / 0", "nothing = 1", "a b")]
    assert answers[:3] == ["2", "ZeroDivisionError('division by zero')", "KeyError('answer')"]
    assert answers[3].startswith("SyntaxError(")
