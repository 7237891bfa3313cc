"""How long until a test has its machine, next to what QEMU alone takes for the same: cold boot, bare floor, fixture, and commands.

All kinds of measurements take turns in one run, so that whatever else the computer does meanwhile falls on all of them alike: only ratios
within one run mean something. The floor is a machine with the same argv, started and restored by the least code that does it: no library
for QMP or the guest agent, no waking of the guest, no check of anything.

    python benchmarks/restore.py --catalog ~/.cache/pytest-vmbottle -n 15
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.port import Start
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.backends.qemu.command_line import LaunchResources, command_line
from pytest_vmbottle.backends.qemu.disks import slots
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.channels.port import GUEST_PATH, Channel, Command
from pytest_vmbottle.disks.overlay import write_overlay
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision import Provisioner, Settings

COLD = "cold boot to first exec"
FLOOR_REPLY = "floor: to the agent's first reply"
FLOOR_EXEC = "floor: to the first guest-exec"
READY = "machine: ready"
FIXTURE = "machine: to first exec"
PYTEST = "`vm` fixture in pytest, to first exec"
SPARE = "the same, the machine made beforehand"
BARE = "warm guest-exec, bare"
EXEC = "warm exec, runner"
SSH = "warm exec, SSH"
ROWS = (COLD, FLOOR_REPLY, FLOOR_EXEC, READY, FIXTURE, PYTEST, SPARE, BARE, EXEC, SSH)

TEST = """
import time
import pytest

@pytest.fixture
def began():
    return time.perf_counter()

@pytest.mark.vm({image!r}, memory={memory})
@pytest.mark.parametrize("attempt", ["warm-up", "measured"])
def test_first_exec(began, vm, record_property, attempt):
    vm.exec(["true"])
    record_property(attempt, time.perf_counter() - began)
    if {wait} and attempt == "warm-up":  # a test that leaves time for what is made meanwhile
        time.sleep({wait})
"""


@attrs.frozen
class Ratio:
    """One figure over another, and what it is to be."""

    name: str
    over: str
    under: str
    aim: str
    reached: Callable[[float], bool]


RATIOS = (
    Ratio("fixture / floor, to the first command", FIXTURE, FLOOR_EXEC, "<= 1.3", lambda value: value <= 1.3),
    Ratio("fixture in pytest / floor, to the first command", PYTEST, FLOOR_EXEC, "<= 1.3", lambda value: value <= 1.3),
    Ratio("cold boot / fixture", COLD, FIXTURE, ">= 60 without KVM", lambda value: value >= 60),
    Ratio("fixture with a spare / without", SPARE, PYTEST, "<= 0.2", lambda value: value <= 0.2),
    Ratio("exec / bare guest-exec", EXEC, BARE, "<= 0.5", lambda value: value <= 0.5),
)


class Sockets:
    """JSON lines on a socket: the whole of QMP and of the guest agent's protocol."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._file.readline().rpartition(b"\xff")[2])
        return message

    def ask(self, command: str, *, fds: tuple[int, ...] = (), **arguments: object) -> Any:
        message = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        socket.send_fds(self.sock, [json.dumps(message).encode() + b"\n"], fds)
        while "return" not in (answer := self.receive()):
            if "error" in answer:
                sys.exit(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def await_event(self, name: str, status: str) -> None:
        while (message := self.receive()).get("event") != name or message["data"]["status"] != status:
            pass


class Floor:
    """A machine restored by the same QEMU with the same argv, and nothing else."""

    def __init__(self, provisioner: Provisioner, backend: QemuBackend, spec: MachineSpec) -> None:
        self._backend, self._spec = backend, spec
        pack = provisioner.pack(spec)
        self._start: Start = provisioner.start(spec, pack)
        self._saved = pack.path

    @contextmanager
    def run(self) -> Iterator[tuple[Sockets, Sockets]]:
        """A machine that runs again; its monitor and its agent."""
        with tempfile.TemporaryDirectory(prefix="vmbottle-floor-") as folder, ExitStack() as stack:
            rundir = Path(folder)
            write_overlay(rundir / "disk.qcow2", size=self._start.disk_size)
            state = stack.enter_context((self._saved / "state.bin").open("rb"))
            self.began = time.perf_counter()
            pairs = [
                tuple(stack.enter_context(sock) for sock in socket.socketpair()) for _ in ("qmp", "agent", "waker", "runner", "console")
            ]
            ours, ports = [pair[0] for pair in pairs], tuple(pair[1].fileno() for pair in pairs)
            argv = command_line(self._backend.emulator(self._spec.arch), self._spec, self._wiring(rundir, ports))
            process = subprocess.Popen(argv, pass_fds=ports, cwd="/", stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            qmp, agent = (stack.enter_context(closing(Sockets(sock))) for sock in ours[:2])
            qmp.receive()  # the greeting
            qmp.ask("qmp_capabilities")
            capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
            qmp.ask("migrate-set-capabilities", capabilities=capabilities)
            qmp.ask("getfd", fdname="state", fds=(state.fileno(),))
            qmp.ask("migrate-incoming", uri="fd:state")
            qmp.await_event("MIGRATION", "completed")
            qmp.ask("cont")
            yield qmp, agent

    def _wiring(self, rundir: Path, ports: tuple[int, ...]) -> LaunchResources:
        start = self._start
        qmp, agent, waker, runner, console = ports
        return LaunchResources(
            name="floor",
            ram=self._saved / "ram.img",
            share=False,
            disks=slots(start, {}, rundir, track_root=False),
            seed=start.seed,
            kernel=start.kernel,
            initrd=start.initrd,
            cmdline=start.cmdline,
            qmp=qmp,
            agent=agent,
            waker=waker,
            runner=runner,
            console=console,
            incoming=True,
        )


def guest_true(agent: Sockets) -> None:
    """Runs `true` by the agent's two calls. Asked more often, an emulated guest spends its time on answers; more seldom, they come late."""
    path = [f"PATH={GUEST_PATH}"]
    pid = agent.ask("guest-exec", path="true", arg=[], env=path, capture_output=True)["pid"]
    while not agent.ask("guest-exec-status", pid=pid)["exited"]:
        time.sleep(0.005)


class Benchmark:
    """All measurements of one run, in seconds."""

    def __init__(self, provisioner: Provisioner, backend: QemuBackend, spec: MachineSpec, catalog: Path) -> None:
        self.figures: dict[str, list[float]] = {name: [] for name in ROWS}
        self._provisioner, self._spec, self._catalog = provisioner, spec, catalog
        self._floor = Floor(provisioner, backend, spec)

    def _note(self, name: str, began: float) -> None:
        self.figures[name].append(time.perf_counter() - began)

    def cold(self) -> None:
        began = time.perf_counter()
        with self._provisioner.machine(attrs.evolve(self._spec, env={}, files={}, fresh="boot")) as machine:
            machine.exec(["true"])
            self._note(COLD, began)

    def floor(self) -> None:
        with self._floor.run() as (_, agent):
            agent.ask("guest-sync-delimited", id=1)
            self._note(FLOOR_REPLY, self._floor.began)
            guest_true(agent)
            self._note(FLOOR_EXEC, self._floor.began)
            self._warm(BARE, lambda: guest_true(agent))

    def machine(self) -> None:
        began = time.perf_counter()
        with self._provisioner.machine(self._spec) as machine:
            self._note(READY, began)
            machine.exec(["true"])
            self._note(FIXTURE, began)
            self._warm(EXEC, lambda: machine.exec(["true"]))
            ssh = _ssh(machine)
            self._warm(SSH, lambda: ssh.run(Command(argv=("true",), env=(("PATH", GUEST_PATH),)), deadline=Deadline(60)))

    def _warm(self, name: str, run: Callable[[], object]) -> None:
        for _ in range(3):
            run()
        samples = []
        for _ in range(7):
            began = time.perf_counter()
            run()
            samples.append(time.perf_counter() - began)
        self.figures[name].append(statistics.median(samples))

    def in_pytest(self) -> None:
        """The same by the fixture of a real pytest run, in the second test: the first finds out what later ones know."""
        self._in_pytest(PYTEST, spares=0, wait=0)

    def in_pytest_with_spares(self) -> None:
        """The same, if the first test takes some seconds."""
        self._in_pytest(SPARE, spares=1, wait=4)

    def _in_pytest(self, name: str, *, spares: int, wait: int) -> None:
        seen: list[float] = []

        class Properties:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                seen.extend(float(str(value)) for name, value in report.user_properties if name == "measured" and report.when == "call")

        with tempfile.TemporaryDirectory(prefix="vmbottle-pytest-") as folder:
            test = Path(folder) / f"test_{secrets.token_hex(4)}.py"  # pytest imports a module of one name only once
            test.write_text(TEST.format(image=str(self._spec.image), memory=self._spec.memory, wait=wait))
            options = [
                f"--vm-spares={spares}",
                "-q",
                "--no-header",
                "--no-summary",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:randomly",  # the second test is the one that is measured
                "--rootdir",
                folder,
                "--capture=fd",
            ]
            with open(os.devnull, "w") as null, _stdout(null.fileno()):  # noqa: PTH123 - a device
                status = pytest.main([*options, "--vm-missing=fail", f"--vm-catalog={self._catalog}", str(test)], plugins=[Properties()])
        if status or len(seen) != 1:
            sys.exit(f"the pytest run failed with {status!r}")
        self.figures[name] += seen


@contextmanager
def _stdout(fd: int) -> Iterator[None]:
    """Sends what is written to standard output elsewhere for the length of a block."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(fd, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _ssh(machine: Machine) -> Channel:
    return machine.lifecycle.instance.channel(deadline=Deadline(120), bulk=True)


def percentile_95(figures: list[float]) -> float:
    """The value below which 95 of 100 figures lie, interpolated."""
    return statistics.quantiles(figures, n=20, method="inclusive")[18] if len(figures) > 1 else figures[0]


def summary(figures: dict[str, list[float]]) -> dict[str, Any]:
    """What the run came to, as JSON can write it."""
    rows: dict[str, dict[str, Any]] = {
        name: {"median": statistics.median(seconds), "p95": percentile_95(seconds), "n": len(seconds), "seconds": seconds}
        for name, seconds in figures.items()
        if seconds
    }
    ratios = {
        ratio.name: {"value": rows[ratio.over]["median"] / rows[ratio.under]["median"], "aim": ratio.aim}
        for ratio in RATIOS
        if ratio.over in rows and ratio.under in rows
    }
    return {"rows": rows, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    """The same as two tables in Markdown."""
    lines = ["| measured | median, s | p95, s | n |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {row['median']:.3f} | {row['p95']:.3f} | {row['n']} |" for name, row in result["rows"].items()]
    lines += ["", "| ratio of medians | value | aim | reached |", "|---|---:|---|---|"]
    for ratio in RATIOS:
        if ratio.name in result["ratios"]:
            value = result["ratios"][ratio.name]["value"]
            lines.append(f"| {ratio.name} | {value:.2f} | {ratio.aim} | {'yes' if ratio.reached(value) else 'no'} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures how long machines and commands take, next to QEMU alone.")
    parser.add_argument("-n", "--rounds", type=int, default=15, help="rounds of everything but cold boots (default: 15)")
    parser.add_argument("--cold", type=int, default=3, help="cold boots (default: 3); they take the most time")
    parser.add_argument("--no-pytest", action="store_true", help="leave out the run inside pytest")
    parser.add_argument("--image", default="debian-12", help="what to pour (default: debian-12)")
    parser.add_argument("--memory", default="1G", help="RAM of the machines (default: 1G)")
    parser.add_argument("--catalog", type=Path, default=default_root(), help="the catalog (default: the user's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    catalog = Catalog(options.catalog.expanduser())
    backend = QemuBackend(proofs=catalog.proofs)
    settings = Settings(report=lambda line: print(line, file=sys.stderr))
    provisioner = Provisioner(catalog, backend, name="qemu", settings=settings)
    with closing(provisioner):
        benchmark = Benchmark(provisioner, backend, MachineSpec.resolve(options.image, {"memory": options.memory}), catalog.root)
        kinds = [benchmark.floor, benchmark.machine, *([] if options.no_pytest else [benchmark.in_pytest, benchmark.in_pytest_with_spares])]
        for kind in kinds:  # once for nothing: files are in the page cache afterwards, modules are imported, the pack has been checked
            kind()
        for seconds in benchmark.figures.values():
            seconds.clear()
        for number in range(options.rounds):
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                kind()
            if number * options.cold // options.rounds < (number + 1) * options.cold // options.rounds:
                benchmark.cold()
    return benchmark.figures


def main() -> None:
    options = arguments()
    result = summary(measure(options))
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
