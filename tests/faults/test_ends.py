"""How runs end: by signals, crashes and time-outs, with workers and without. Whatever it is, nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import attrs
import psutil
import pytest

from pytest_vmbottle.host.deadline import Deadline
from tests.conftest import is_gone, line, process

pytestmark = pytest.mark.usefixtures("image", "canary")

Start = Callable[..., "Run"]
Rounds = Callable[[str, int], range]

SLEEPING = """
import time, pytest

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range({workers}))
def test_sleeps(vm, session_vm, n):
    time.sleep(600)
"""
PLUGINS = ("pytest_vmbottle.plugin", "standins", "no:cacheprovider")


def gone(pids: list[int]) -> bool:
    """Tell whether processes are gone, within a short time."""
    return bool(Deadline(20).poll(lambda: all(map(is_gone, pids)), every=0.01))


@attrs.frozen(eq=False)
class Run:
    """A pytest run, in a session of its own."""

    process: subprocess.Popen[bytes]
    root: Path
    output: Path

    def owners(self) -> list[Path]:
        """The folders of the processes that have machines."""
        return [path for path in self.root.glob("run/*") if path.is_dir()]

    def machines(self) -> list[int]:
        """The processes of the machines there are, by their records."""
        found: list[int] = []
        records: list[Path] = []
        for owner in self.owners():
            with suppress(FileNotFoundError):  # an owner may go meanwhile
                records += owner.glob("*.json")
        for path in records:
            with suppress(OSError, ValueError):
                process = json.loads(path.read_bytes())["record"]["process"]
                found += [process[0]] if process and not is_gone(process[0]) else []
        return found

    def await_machines(self, count: int) -> list[int]:
        """Waits until there are so many."""
        found = Deadline(120).poll(lambda: machines if len(machines := self.machines()) == count else None, every=0.05)
        assert found, f"there are {len(self.machines())} machines of {count}: {self.said()}"
        return found

    def workers(self) -> list[int]:
        """The processes that have machines."""
        return [int(path.name.partition("-")[0]) for path in self.owners()]

    def supervisors(self) -> list[int]:
        """The processes that see to them."""
        words = {each.pid: " ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])}
        return [pid for pid, line in words.items() if "supervisor.py" in line and str(self.root) in line]

    def signal(self, number: int) -> None:
        """Sends the controller a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def signal_group(self, number: int) -> None:
        """Sends all of them a signal, as a terminal does, or CI."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Its status."""
        return self.process.wait(120)

    def said(self) -> str:
        """Return the output of the run."""
        return self.output.read_text(errors="replace")


@pytest.fixture
def start(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A function that starts a pytest run on a test file, with no more plugins than it says."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("VMBOTTLE_BACKEND", "standin")
    runs: list[Run] = []

    def start(text: str, *options: str, plugins: tuple[str, ...] = ("xdist",)) -> Run:
        folder = tmp_path / f"project{len(runs)}"
        folder.mkdir()
        (folder / "test_it.py").write_text(text)
        wanted = [word for name in (*PLUGINS, *plugins) for word in ("-p", name)]
        words = [*wanted, "--rootdir", str(folder), "-o", "vm_defaults=memory='16M'", *options, str(folder)]
        argv = ["env", "--default-signal=INT", sys.executable, "-m", "pytest", *words]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(argv, cwd=folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)
        runs.append(Run(process, root, folder / "output"))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


@pytest.fixture
def nothing_left(left: Callable[[], object]) -> Callable[[], float]:
    """Waits until nothing is left, and says how many seconds that took."""

    def nothing_left() -> float:
        began = time.monotonic()
        Deadline(20).poll(lambda: not left(), every=0.05)
        assert not left()
        return time.monotonic() - began

    return nothing_left


# -- the controller, and all at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers", [(signal.SIGKILL, signal.SIGTERM), pytest.param((signal.SIGHUP, signal.SIGINT), marks=pytest.mark.guests)]
)
def test_a_controller_that_gets_a_signal_takes_its_workers_and_their_machines_with_it(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds, numbers: tuple[signal.Signals, ...]
) -> None:
    for _ in rounds("A3", 1):
        runs = [start(SLEEPING.format(workers=2), "-n2") for _ in numbers]  # side by side, since xdist takes its time
        runs[0].await_machines(4 * len(runs))
        for run, number in zip(runs, numbers, strict=True):
            run.signal(number)
        ends = [-number if number == signal.SIGKILL else pytest.ExitCode.INTERRUPTED for number in numbers]
        assert [run.wait() for run in runs] == ends
        nothing_left()


def test_a_run_without_workers_ends_in_order_by_any_signal(start: Start, nothing_left: Callable[[], float], rounds: Rounds) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    text = """
import pytest, time

@pytest.fixture
def mine(vm):
    yield
    print("torn", "down")

@pytest.mark.vm("debian-12")
def test_it(mine):
    print("in the", "test", flush=True)
    time.sleep(600)
"""
    for _ in rounds("A3", 1):
        runs = [start(text, "-s", plugins=()) for _ in numbers]
        for run, number in zip(runs, numbers, strict=True):
            assert Deadline(120).poll(lambda run=run: "in the test" in run.said())  # type: ignore[misc]
            run.signal(number)
        assert [run.wait() for run in runs] == [pytest.ExitCode.INTERRUPTED] * 3
        for run in runs:
            assert "torn down" in run.said()
            assert "INTERNALERROR" not in run.said()
        nothing_left()


@pytest.mark.guests
def test_a_cancelled_ci_job_leaves_nothing(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds, measured: Callable[[str, Iterable[float]], None]
) -> None:
    seconds = []
    for _ in rounds("A4", 1):
        run = start(SLEEPING.format(workers=2), "-n2")
        run.await_machines(4)
        run.signal_group(signal.SIGTERM)
        time.sleep(2.5)
        run.signal_group(signal.SIGKILL)
        run.wait()
        seconds.append(nothing_left())
    measured("SIGKILL of the group, 2.5 s after SIGTERM, to nothing left", seconds)


@pytest.mark.guests
def test_ctrl_c_twice_leaves_nothing(start: Start, nothing_left: Callable[[], float], rounds: Rounds) -> None:
    for turn in rounds("A5", 1):
        run = start(SLEEPING.format(workers=2), "-n2")
        run.await_machines(4)
        run.signal_group(signal.SIGINT)
        time.sleep(0.2 + turn % 10 * 0.3)
        run.signal_group(signal.SIGINT)
        run.wait()
        nothing_left()


@pytest.mark.guests
def test_a_teardown_that_takes_longer_than_anybody_waits_keeps_no_machine(start: Start, nothing_left: Callable[[], float]) -> None:
    run = start(
        "import pytest, time\n"
        "@pytest.fixture(scope='session')\ndef slow(session_vm):\n    yield\n    time.sleep(30)\n"
        "@pytest.mark.vm('debian-12')\n@pytest.mark.parametrize('n', range(2))\ndef test_it(slow, n): time.sleep(600)\n",
        "-n2",
    )
    machines = run.await_machines(2)
    run.signal_group(signal.SIGINT)
    assert gone(machines)
    assert run.process.poll() is None, "the machines went before the teardown, not after it"
    run.signal_group(signal.SIGKILL)  # xdist would do that to the workers, after 10 s
    run.wait()
    nothing_left()


# -- workers -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), 9)",
        *(
            pytest.param(end, marks=pytest.mark.guests)
            for end in ("os._exit(3)", "os.kill(os.getpid(), 11)", "os.abort()", "os.kill(os.getpid(), 15)")
        ),
    ],
)
def test_a_worker_that_crashes_in_a_test_leaves_nothing_and_the_others_go_on(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds, end: str
) -> None:
    text = f"""
import os, pytest

@pytest.mark.vm("debian-12")
def test_crashes(vm, session_vm):
    {end}

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(3))
def test_passes(vm, n): pass
"""
    for _ in rounds("A2", 1):
        run = start(text, "-n1" if "15" in end else "-n2")
        status = run.wait()
        nothing_left()
        if "15" in end:
            assert status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.TESTS_FAILED)
        else:
            assert (status, re.findall(r"\d+ (?:passed|failed)", run.said())[-2:]) == (1, ["1 failed", "3 passed"])


@pytest.mark.guests
def test_no_more_machines_are_there_than_workers_when_each_test_kills_its_worker(start: Start, nothing_left: Callable[[], float]) -> None:
    text = """
import os, pytest, time

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("n", range(4))
def test_crashes(vm, n):
    time.sleep(0.1)
    os.kill(os.getpid(), 9)
"""
    run = start(text, "-n2", "--max-worker-restart=4")
    most = 0
    while run.process.poll() is None:
        most = max(most, len(run.machines()))
        time.sleep(0.02)
    nothing_left()
    assert 1 <= most <= 3


def test_what_is_left_when_worker_and_supervisor_die_together_goes_with_the_next_run(
    start: Start, root: Path, nothing_left: Callable[[], float], rounds: Rounds, measured: Callable[[str, Iterable[float]], None]
) -> None:
    seconds = []
    for _ in rounds("A6", 1):
        run = start(SLEEPING.format(workers=1), plugins=())
        machines = run.await_machines(2)
        for pid in (*run.supervisors(), *run.workers()):
            os.kill(pid, signal.SIGKILL)
        assert gone(machines), "they are leashed by the kernel too"
        run.wait()
        assert list(root.glob("run/*/*.json")), "nobody was there to remove what was written down"
        began = time.monotonic()
        following = start("import pytest\n@pytest.mark.vm('debian-12')\ndef test_it(vm): pass\n", plugins=())
        assert following.wait() == 0
        seconds.append(time.monotonic() - began)
        nothing_left()
    measured("a whole run that cleans up after another", seconds)


@pytest.mark.parametrize("options", [pytest.param((), id="alone"), pytest.param(("-n2",), id="workers", marks=pytest.mark.guests)])
def test_a_time_out_that_ends_the_process_leaves_nothing(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds, options: tuple[str, ...]
) -> None:
    for _ in rounds("A13", 1):
        run = start(SLEEPING.format(workers=2), "--timeout=1", "--timeout-method=thread", *options, plugins=("xdist", "pytest_timeout"))
        assert run.wait() == 1
        nothing_left()


# -- machines ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.guests
def test_a_machine_that_does_not_react_delays_the_end_of_the_others_by_nothing(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds, measured: Callable[[str, Iterable[float]], None]
) -> None:
    text = """
import pytest, time, os, signal

@pytest.fixture
def eight(vm_factory):
    yield [vm_factory("debian-12", name=f"vm{n}") for n in range(COUNT)]
    began[0] = time.monotonic()

began = [0.0]

@pytest.mark.vm("debian-12")
def test_eight(eight):
    os.kill(eight[3].pid, signal.SIGSTOP)

def test_time():
    print("seconds", time.monotonic() - began[0], "seconds")
"""
    seconds: dict[int, list[float]] = {4: [], 8: []}
    for _ in rounds("A9", 1):
        for count, each in seconds.items():
            run = start(text.replace("COUNT", str(count)), "-s", plugins=())
            assert run.wait() == 0, run.said()
            each.append(float(run.said().partition("seconds ")[2].partition(" seconds")[0]))
            nothing_left()
    for count, each in seconds.items():
        measured(f"{count} machines ended, one of them stopped", each)


@pytest.mark.guests
def test_a_worker_with_four_machines_is_gone_soon_after_sigterm(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds, measured: Callable[[str, Iterable[float]], None]
) -> None:
    text = """
import pytest, time

@pytest.mark.vm("debian-12")
def test_four(vm_factory):
    four = [vm_factory("debian-12", name=f"vm{n}") for n in range(4)]
    time.sleep(600)
"""
    off, clean = [], []
    for _ in rounds("four", 1):
        run = start(text, plugins=())
        machines = run.await_machines(4)
        time.sleep(0.3)
        began = time.monotonic()
        run.signal(signal.SIGTERM)
        assert gone(machines)
        off.append(time.monotonic() - began)
        assert run.wait() == pytest.ExitCode.INTERRUPTED
        nothing_left()
        clean.append(time.monotonic() - began)
    measured("SIGTERM to a worker with four machines to the last of them gone", off)
    measured("the same to the end of the worker, with nothing left", clean)


def test_a_machine_killed_from_outside_fails_the_test_with_the_reason(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds
) -> None:
    text = """
import os, pytest
from pytest_vmbottle import MachineDied

@pytest.mark.vm("debian-12")
def test_killed(vm):
    os.kill(vm.pid, 9)
    with pytest.raises(MachineDied, match="-9"):
        vm.wait_until(lambda: False, timeout=60)
"""
    for _ in rounds("A10", 1):
        run = start(text, plugins=())
        assert run.wait() == 0, run.said()
        nothing_left()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-machine none -netdev user,id=n,hostfwd=tcp:127.0.0.1:PORT-:22", "Could not set up host forwarding rule"),
        pytest.param("-machine none -no-such-option", "invalid option", marks=pytest.mark.guests),
        pytest.param("-machine none -accel no-such", "no-such", marks=pytest.mark.guests),
        pytest.param("-machine q35 -bios /nonexistent/firmware", "could not load PC BIOS", marks=pytest.mark.guests),
    ],
)
def test_a_qemu_that_does_not_start_is_an_error_with_what_it_printed_and_leaves_nothing(
    start: Start, nothing_left: Callable[[], float], words: str, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments = words.replace("PORT", str(server.getsockname()[1]))
        run = start(f"import pytest\n@pytest.mark.vm('debian-12', env={{'ARGS': {arguments!r}}})\ndef test_it(vm): pass\n", plugins=())
        assert run.wait() == 1
    assert said in run.said()
    assert "Traceback" not in run.said()
    nothing_left()


@pytest.mark.guests
def test_a_machine_that_a_thread_started_outlives_the_thread(start: Start, nothing_left: Callable[[], float]) -> None:
    text = """
import concurrent.futures, os, pytest, time

@pytest.mark.vm("debian-12")
def test_it(vm_factory):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        machine = pool.submit(vm_factory, "debian-12").result()
    time.sleep(1)
    assert machine.lifecycle.instance.exitcode is None
"""
    run = start(text, plugins=())
    assert run.wait() == 0, run.said()
    nothing_left()


def test_a_forked_child_that_ends_in_any_way_takes_no_machine_with_it(
    start: Start, nothing_left: Callable[[], float], rounds: Rounds
) -> None:
    text = """
import multiprocessing, os, pytest, signal, sys

HOW = {
    "exits": lambda: sys.exit(0),
    "is gone": lambda: os._exit(0),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "fails": lambda: 1 / 0,
}

@pytest.mark.vm("debian-12")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", HOW)
def test_multiprocessing(vm, session_vm, how):
    child = multiprocessing.get_context("fork").Process(target=HOW[how])
    child.start()
    child.join(60)
    assert child.exitcode is not None
    assert vm.lifecycle.instance.exitcode is session_vm.lifecycle.instance.exitcode is None

@pytest.mark.vm("debian-12")
@pytest.mark.filterwarnings("ignore")
def test_fork(vm, session_vm):
    child = os.fork()
    if child == 0:
        pytest.exit("the child goes through all teardowns")
    assert os.waitpid(child, 0)[0] == child
    assert vm.lifecycle.instance.exitcode is session_vm.lifecycle.instance.exitcode is None
    assert os.path.isdir(os.path.dirname(vm.console.path))
"""
    for _ in rounds("A16", 1):
        run = start(text, plugins=())
        assert run.wait() == 0, run.said()
        assert "5 passed" in run.said()
        nothing_left()


FORKING = """
import os, pytest, signal, traceback
from pytest_vmbottle import MachineError

pytestmark = pytest.mark.filterwarnings("ignore")

def in_a_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

@pytest.mark.vm("debian-12")
def test_looking(vm):
    pid = vm.pid
    def look():
        assert (str(vm.state), vm.pid) == ("running", pid)
        assert str(pid) in repr(vm)
        vm.console.text
    assert in_a_child(look) == 0
    def see_its_end():
        os.kill(pid, signal.SIGKILL)
        while str(vm.state) != "off":
            pass
    assert in_a_child(see_its_end) == 0

USES = {
    "exec": lambda vm, _: vm.exec("true"),
    "spawn": lambda vm, _: vm.spawn("true"),
    "cp": lambda vm, _: vm.cp("/etc/hosts", vm.path("/tmp")),
    "read": lambda vm, _: vm.path("/x").read_text(),
    "wait_until": lambda vm, _: vm.wait_until("true"),
    "wait_for_console": lambda vm, _: vm.wait_for_console("nothing"),
    "metrics": lambda vm, _: vm.metrics(),
    "impair": lambda vm, _: vm.impair(),
    "forward": lambda vm, _: vm.forward(22),
    "pause": lambda vm, _: vm.pause(),
    "resume": lambda vm, _: vm.resume(),
    "start": lambda vm, _: vm.start(),
    "reboot": lambda vm, _: vm.reboot(),
    "restore": lambda vm, _: vm.restore(),
    "poweroff": lambda vm, _: vm.poweroff(),
    "power_cut": lambda vm, _: vm.power_cut(),
    "snapshot": lambda vm, _: vm.snapshot("x"),
    "wait": lambda _, running: running.wait(),
    "poll": lambda _, running: running.poll(),
    "kill": lambda _, running: running.kill(),
    "write": lambda _, running: running.stdin.write("x"),
}

@pytest.mark.vm("debian-12")
@pytest.mark.parametrize("off", [False, True])
def test_use(vm, off):
    running = vm.spawn("true")
    if off:
        vm.power_cut()
    owner = str(os.getpid())
    def use():
        for name, call in USES.items():
            try:
                call(vm, running)
            except MachineError as error:
                assert owner in str(error), name
            else:
                raise AssertionError(name)
        vm.lifecycle.stop()
    assert in_a_child(use) == 0
    assert str(vm.state) == ("off" if off else "running")

@pytest.mark.vm("debian-12")
def test_its_own(vm, vm_factory):
    def start():
        mine = vm_factory("debian-12")
        assert str(mine.state) == "running" and mine.pid != vm.pid
        mine.exec("true")
        mine.power_cut()
        assert str(mine.state) == "off"
    assert in_a_child(start) == 0
    assert str(vm.state) == "running"
    assert str(vm_factory("debian-12").state) == "running"
"""


def test_a_forked_child_sees_the_machines_of_its_parent_may_not_use_them_and_has_its_own(
    start: Start, nothing_left: Callable[[], float]
) -> None:
    run = start(FORKING, plugins=())
    assert run.wait() == 0, run.said()
    assert "4 passed" in run.said()
    nothing_left()


MONITORS = """
import os, shutil, signal, socket, sys
from contextlib import suppress
from pathlib import Path
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.backends.qemu.process import QemuProcess
from pytest_vmbottle.backends.qemu.qmp import Qmp, QmpFailed

def started(name):
    ours, its = socket.socketpair()
    monitor = ["-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control"]
    argv = [shutil.which("qemu-system-x86_64"), "-S", "-nodefaults", "-display", "none", "-machine", "none", *monitor]
    process = QemuProcess(argv, log=Path(sys.argv[1], name), fds=(its.fileno(),))
    its.close()
    return process, Qmp(ours, deadline=Deadline(60))

def answers(qmp):
    return "status" in qmp.execute("query-status", deadline=Deadline(30))

process, qmp = started("first")
child = os.fork()
if child == 0:
    signal.alarm(60)
    told = False
    try:
        qmp.execute("query-status", deadline=Deadline(30))
    except QmpFailed:
        told = True
    qmp.close()
    process.kill()
    other, monitor = started("second")
    fine = told and process.exitcode is None and process.wait(Deadline(0)) is None and answers(monitor)
    monitor.close()
    other.kill()
    os._exit(0 if fine else 1)
status = os.waitpid(child, 0)[1]
print(status, answers(qmp), process.exitcode, flush=True)
process.kill()
"""


def test_a_forked_child_can_neither_speak_to_a_qemu_of_its_parent_nor_end_it(tmp_path: Path) -> None:
    with process(MONITORS, tmp_path) as parent:
        assert line(parent) == "0 True None"


def test_a_child_that_a_dead_worker_has_forked_keeps_no_machine_alive(start: Start, nothing_left: Callable[[], float]) -> None:
    text = """
import os, pytest, time

@pytest.mark.vm("debian-12")
def test_it(vm):
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
"""
    run = start(text, plugins=())
    machines = run.await_machines(1)
    time.sleep(0.3)
    run.signal(signal.SIGKILL)
    assert gone(machines)
    assert Deadline(10).poll(lambda: not run.owners(), every=0.01), "the supervisor does not wait for the child"
    run.signal_group(signal.SIGKILL)
    run.wait()
    nothing_left()


@pytest.mark.parametrize(
    "together", [pytest.param(False, id="killed"), pytest.param(True, id="with its supervisor", marks=pytest.mark.guests)]
)
def test_machines_that_outlive_their_starter_by_design_are_ended_by_their_command(
    start: Start, nothing_left: Callable[[], float], monkeypatch: pytest.MonkeyPatch, *, together: bool
) -> None:
    monkeypatch.setenv("VMBOTTLE_BACKEND", "detached")
    run = start(SLEEPING.format(workers=1), plugins=())
    machines = run.await_machines(2)
    for pid in (*(run.supervisors() if together else ()), *run.workers()):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    if together:
        time.sleep(0.5)
        assert not any(map(is_gone, machines)), "nothing but their command ends them"
        following = start("import pytest\n@pytest.mark.vm('debian-12')\ndef test_it(vm): pass\n", plugins=())
        assert following.wait() == 0, following.said()
    nothing_left()
