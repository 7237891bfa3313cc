"""smolvm's command lines and answers, as its version 1.32.2 was seen to give them; the machines themselves are in tests/smolvm."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest

from pytest_vmbottle.backends.smolvm import Engine, Program, SmolvmBackend, find_program
from pytest_vmbottle.backends.smolvm.backend import ProbeResult as Proved
from pytest_vmbottle.backends.smolvm.backend import _place
from pytest_vmbottle.backends.smolvm.channel import Outcome, SmolvmChannel, SmolvmTerminal
from pytest_vmbottle.backends.smolvm.engine import LABEL, Creation
from pytest_vmbottle.backends.smolvm.program import VARIABLE, judge
from pytest_vmbottle.backends.smolvm.vmm import Follower, Vmm, is_dead, me
from pytest_vmbottle.channels.port import Command
from pytest_vmbottle.errors import BackendUnavailable, MachineDied, SmolvmError, SpecError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.supervisor import Identity, Record, reap
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.spec.pack_kind import PackKind

NOTE = "note: no packed assets found for 'smol-vmm' (looked for a 'smol-vmm.smolmachine' sidecar next to the executable); running as ..."
REFUSES = """echo '{{"error":{{"code":"SMOLVM_ERROR","message":"{}"}}}}' >&2; exit 1"""
HELP = "Usage: smolvm machine [OPTIONS] <COMMAND>\n\nCommands:\n" + "".join(
    f"  {verb:10}  does it\n" for verb in ("run", "exec", "create", "start", "branch", "checkpoint", "stop", "delete", "cp")
)
LISTING = [
    {"name": "m1", "state": "running", "pid": 564, "labels": {LABEL: "7.8.9"}, "cpus": 1, "memory_mib": 512},
    {"name": "m2", "state": "stopped", "pid": None, "labels": {}, "cpus": 1, "memory_mib": 512},
]

Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a program that notes its words and then does what a piece of shell says."""

    def write(body: str) -> Path:
        program = tmp_path / "smolvm"
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\necho "{NOTE}" >&2\n{body}\n')
        program.chmod(0o755)
        return program

    return write


@pytest.fixture
def engine(script: Script, tmp_path: Path) -> Callable[[str], Engine]:
    """An engine whose program does what a piece of shell says."""
    return lambda body: Engine(Program(path=script(body), version="1.32.2", verbs=frozenset()), tmp_path / "state")


def words(folder: Path) -> list[str]:
    """Words of the program's last call."""
    return (folder / "words").read_text().splitlines()


def test_a_machine_is_made_with_everything_said_and_its_network_always_switched_on(engine: Callable[[str], Engine], tmp_path: Path) -> None:
    made_of = Creation(packed=Path("/p/x.smolmachine"), cpus=2, memory=512 << 20, network=("10.0.0.0/8",), ports={80: 4000}, label="me")
    engine("").create("m1", attrs.evolve(made_of, disk=(4 << 30) + 1, nested=True))
    state = ["--error-format", "json", "--state-dir", str(tmp_path / "state")]
    assert words(tmp_path) == [
        *(
            "machine",
            "create",
            *state,
            "--name",
            "m1",
            "--from",
            "/p/x.smolmachine",
            "--cpus",
            "2",
            "--mem",
            "512",
            "--overlay",
            "5",
            "--nested",
        ),
        *("--net", "--allow-cidr", "10.0.0.0/8", "--port", "4000:80", "--label", f"{LABEL}=me"),
    ]


@pytest.mark.parametrize(("network", "expected"), [(False, ()), (True, ("--net",))])
def test_the_network_is_off_or_on(*, network: bool, expected: tuple[str, ...]) -> None:
    assert tuple(word for word in Creation(network=network).words if word.startswith("--net")) == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda engine: engine.stop("m1"), ["machine", "stop", "--name", "m1"]),
        (lambda engine: engine.delete("m1"), ["machine", "delete", "-f", "--name", "m1"]),
        (lambda engine: engine.copy_in("m1", Path("/a"), "/b"), ["machine", "cp", "/a", "m1:/b"]),
        (lambda engine: engine.copy_out("m1", "/b", Path("/a")), ["machine", "cp", "m1:/b", "/a"]),
        (lambda engine: engine.status("m1"), ["machine", "status", "--name", "m1"]),
        (lambda engine: engine.data_dir("m1"), ["machine", "data-dir", "--name", "m1"]),
        (lambda engine: engine.checkpoint("m1", Path("/c")), ["machine", "checkpoint", "--name", "m1", "--output", "/c"]),
        (
            lambda engine: engine.pack(Path("/p"), machine="m1"),
            ["pack", "create", "--from-vm", "m1", "--include-workspace", "--output", "/p"],
        ),
        (lambda engine: engine.pack(Path("/p"), image="alpine"), ["pack", "create", "--image", "alpine", "--output", "/p"]),
    ],
)
def test_each_command_is_asked_for_by_name(
    call: Callable[[Engine], object], expected: list[str], engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    call(engine(""))
    asked = words(tmp_path)
    assert asked[:2] + asked[6:] == expected


def test_a_start_gives_the_process_that_runs_the_machine(engine: Callable[[str], Engine]) -> None:
    assert engine("echo \"Starting machine 'm1'...\"; echo \"Machine 'm1' running (PID: 564)\"").start("m1", branchable=True) == 564


def test_machines_are_read(engine: Callable[[str], Engine]) -> None:
    listed = engine(f"echo '{json.dumps(LISTING)}'").machines()
    assert [(each.name, each.state, each.pid, dict(each.labels)) for each in listed] == [
        ("m1", "running", 564, {LABEL: "7.8.9"}),
        ("m2", "stopped", None, {}),
    ]


def test_a_failure_has_the_words_the_command_line_and_the_code(engine: Callable[[str], Engine]) -> None:
    failing = engine("""echo '{"error":{"code":"SMOLVM_ERROR","message":"VM m1 is running. Stop it first"}}' >&2; exit 1""")
    with pytest.raises(SmolvmError, match="VM m1 is running") as caught:
        failing.pack(Path("/p"), machine="m1")
    assert (caught.value.returncode, caught.value.code) == (1, "SMOLVM_ERROR")
    assert "note:" not in caught.value.stderr
    assert "--from-vm m1" in str(caught.value)


def test_what_is_not_there_is_no_failure_to_remove(engine: Callable[[str], Engine]) -> None:
    assert engine("""echo '{"error":{"code":"NOT_FOUND","message":"vm not found: m1"}}' >&2; exit 1""").delete("m1") is False


def test_a_locked_database_is_tried_again_and_another_failure_is_not(engine: Callable[[str], Engine], tmp_path: Path) -> None:
    count = tmp_path / "count"
    locked = """echo '{"error":{"code":"DATABASE_ERROR","message":"database is locked"}}' >&2; exit 1"""
    body = f'echo x >> {count}; [ "$(wc -l < {count})" -ge 3 ] || {{ {locked}; }}'
    engine(body).stop("m1")
    assert count.read_text() == "x\n" * 3
    with pytest.raises(SmolvmError, match="other"):
        engine(f"echo x >> {count}; echo other >&2; exit 1").stop("m1")
    assert count.read_text() == "x\n" * 4


@pytest.mark.parametrize("meanwhile", ["true", REFUSES.format("m1 is not running")])
def test_a_machine_that_does_not_write_its_files_out_in_time_is_stopped_again_when_it_has(
    engine: Callable[[str], Engine], tmp_path: Path, meanwhile: str
) -> None:
    verbs = tmp_path / "verbs"
    late = REFUSES.format("guest did not confirm; left the VM alive for retry: deadline exceeded")
    engine(f'echo "$2" >> {verbs}; case $(wc -l < {verbs}) in 1) {late} ;; 2) {meanwhile} ;; esac').stop("m1")
    assert verbs.read_text().split() == ["stop", "exec", "stop"]


def test_a_machine_that_does_not_answer_is_not_cut_off_by_stopping_it_again(engine: Callable[[str], Engine], tmp_path: Path) -> None:
    verbs = tmp_path / "verbs"
    late, silent = REFUSES.format("left the VM alive for retry: deadline exceeded"), REFUSES.format("it does not answer")
    with pytest.raises(SmolvmError, match="it does not answer"):
        engine(f'echo "$2" >> {verbs}; case $2 in stop) {late} ;; exec) {silent} ;; esac').stop("m1")
    assert verbs.read_text().split() == ["stop", "exec"]


def test_a_command_that_takes_too_long_is_ended_and_says_so(engine: Callable[[str], Engine]) -> None:
    with pytest.raises(SmolvmError) as caught:
        engine("sleep 60").stop("m1", deadline=Deadline(0.3))
    assert caught.value.returncode is None
    assert "timed out" in str(caught.value).splitlines()[0]


# -- the program -----------------------------------------------------------------------------------------------------------------------


def program(version: str, told: str = HELP) -> str:
    return f"case $1 in --version) echo '{version}' ;; machine) cat <<'END'\n{told}END\n;; esac"


def test_the_right_program_is_known_by_what_it_can_do(script: Script) -> None:
    found = judge(script(program("smolvm 1.32.2")))
    assert isinstance(found, Program)
    assert (found.version, "checkpoint" in found.verbs) == ("1.32.2", True)


@pytest.mark.parametrize(
    ("version", "told", "why"),
    [
        ("smolvm 0.8.4", HELP, r"0\.8\.4"),
        ("smolvm, version 0.3", "Usage: smolvm [OPTIONS]\nError: No such command 'machine'.\n", "machine create"),
        ("what?", HELP, "version"),
    ],
)
def test_others_are_refused_with_the_reason(script: Script, version: str, told: str, why: str) -> None:
    path = script(program(version, told))
    with pytest.raises(BackendUnavailable, match=why) as caught:
        find_program({"PATH": str(path.parent)})
    assert "pip install" in caught.value.remedy
    with pytest.raises(BackendUnavailable, match=f"{VARIABLE}="):
        find_program({VARIABLE: str(path), "PATH": ""})


def test_the_named_one_goes_before_the_search_path(script: Script, tmp_path: Path) -> None:
    good = script(program("smolvm 1.32.2")).rename(tmp_path / "mine")
    assert find_program({VARIABLE: str(good), "PATH": ""}).path == good


# -- commands in a guest ---------------------------------------------------------------------------------------------------------------


def run(argv: list[str], script: Script, tmp_path: Path) -> tuple[int, bytes, bytes]:
    """Runs a command as in a guest, by a program that runs what it is given here."""
    body = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    engine = Engine(Program(path=script(body), version="1", verbs=frozenset()), tmp_path / "state")
    channel = SmolvmChannel(engine, "m1", alive=lambda: None)
    finished = channel.run(Command(argv=tuple(argv), env=(("PATH", os.defpath),), input=b"fed"), deadline=Deadline(30))
    return finished.returncode, finished.stdout, finished.stderr


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["sh", "-c", "echo out; echo err >&2; exit 7"], (7, b"out\n", b"err\n")),
        (["sh", "-c", "exit 1"], (1, b"", b"")),
        (["sh", "-c", "exit 137"], (137, b"", b"")),
        (["sh", "-c", "kill -PIPE $$"], (-13, b"", b"")),
        (["cat"], (0, b"fed", b"")),
        (["printf", "%s", 'it\'s "$HOME" \n`id`'], (0, b'it\'s "$HOME" \n`id`', b"")),
        (["no-such-program"], (127, b"", b"no-such-program: not found\n")),
    ],
)
def test_a_command_gives_its_status_and_its_streams(
    argv: list[str], expected: tuple[int, bytes, bytes], script: Script, tmp_path: Path
) -> None:
    assert run(argv, script, tmp_path) == expected


def test_neither_a_command_nor_its_environment_can_be_read_by_other_users_of_this_computer(script: Script, tmp_path: Path) -> None:
    body = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    engine = Engine(Program(path=script(body), version="1", verbs=frozenset()), tmp_path / "state")
    large = "x" * 100_000 + "\n\n"
    command = Command(argv=("sh", "-c", 'printf "%s" "$SECRET $0"', large), env=(("PATH", os.defpath), ("SECRET", "hunter2\n")))
    finished = SmolvmChannel(engine, "m1", alive=lambda: None).run(command, deadline=Deadline(30))
    assert finished.stdout.decode() == f"hunter2\n {large}"
    assert not re.search("hunter2|xxx", "".join(words(tmp_path)))


def test_a_failure_of_smolvm_is_never_taken_for_a_status_of_1(engine: Callable[[str], Engine]) -> None:
    failing = engine("""echo '{"error":{"code":"NOT_FOUND","message":"vm not found: m1"}}' >&2; exit 1""")
    with pytest.raises(SmolvmError, match="vm not found: m1"):
        SmolvmChannel(failing, "m1", alive=lambda: None).run(Command(argv=("true",)), deadline=Deadline(30))


def test_a_machine_that_ends_during_a_command_is_told_of_although_its_process_is_seen_for_a_moment(engine: Callable[[str], Engine]) -> None:
    asked: list[int] = []

    def alive() -> None:
        asked.append(1)
        if len(asked) > 3:
            raise MachineDied("it has ended")

    cut_off = engine("""echo '{"error":{"code":"SMOLVM_ERROR","message":"io operation failed: connection closed"}}' >&2; exit 1""")
    with pytest.raises(MachineDied, match="it has ended"):
        SmolvmChannel(cut_off, "m1", alive=alive).run(Command(argv=("true",)), deadline=Deadline(30))


def test_at_a_deadline_the_command_is_killed_and_what_it_had_printed_is_there(script: Script, tmp_path: Path) -> None:
    body = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'
    channel = SmolvmChannel(
        Engine(Program(path=script(body), version="1", verbs=frozenset()), tmp_path / "state"), "m1", alive=lambda: None
    )
    hanging = Command(argv=("sh", "-c", "echo before; sleep 4712 & setsid sleep 4712 & sleep 4712"), env=(("PATH", os.defpath),))
    finished = channel.run(hanging, deadline=Deadline(0.5))
    assert (finished.returncode, finished.stdout, finished.timed_out) == (-9, b"before\n", True)
    assert ["sleep", "4712"] not in [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_verdict_is_taken_out_of_stderr_however_it_is_cut(size: int) -> None:
    said = bytearray()
    verdict = Outcome("0123456789abcdef", said.extend)
    whole = NOTE.encode() + b"\nfirst\x1e0123 line\nrest\x1e0123456789abcdefKilled\n 137\nlate"
    for start in range(0, len(whole), size):
        verdict.feed(whole[start : start + size])
    verdict.feed(b"")
    assert (verdict.returncode, bytes(said)) == (-9, b"first\x1e0123 line\nrestlate")


def test_a_note_of_smolvms_own_is_neither_shown_on_a_terminal_nor_taken_for_its_end(script: Script) -> None:
    terminal = SmolvmTerminal([str(script("sleep 0.3; echo hello"))], (100, 30))
    try:
        assert (terminal.receive(), terminal.receive()) == (b"hello\r\n", b"")
    finally:
        terminal.close()


# -- the backend -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of smolvm's machines that cannot be in the catalog."""
    monkeypatch.setattr("pytest_vmbottle.backends.smolvm.backend._SHORT", tmp_path)
    return tmp_path


def test_machines_are_in_the_catalog_unless_its_path_is_too_long_or_roots_smolvm_would_open_it_to_others(short: Path) -> None:
    assert (_place(Path("/catalog/smolvm")) == Path("/catalog/smolvm")) == (os.geteuid() != 0)
    long = Path("/catalog") / ("x" * 60)
    assert _place(long).parent == short / f"vmbottle-{os.geteuid()}"
    assert _place(long) == _place(long) != _place(long / "y")
    (short / f"vmbottle-{os.geteuid()}").chmod(0o755)
    with pytest.raises(BackendUnavailable, match=f"vmbottle-{os.geteuid()}"):
        _place(long)


@pytest.fixture
def backend(tmp_path: Path) -> SmolvmBackend:
    """A backend whose program nobody has looked for."""
    return SmolvmBackend(state=tmp_path / "s", proofs=tmp_path / "proofs", images={"debian-12": "", "web": "./web.tar"})


@pytest.mark.parametrize(
    ("keywords", "why"),
    [
        ({"network": "lan"}, "LAN"),
        ({"display": True}, "display"),
        ({"cpu_clock": "instructions"}, "cpu_clock"),
        ({"append": "quiet"}, "kernel of its own"),
        ({"kernel": "bzImage"}, "kernel of its own"),
        ({"user_data": {"a": 1}}, "cloud-init"),
        ({"arch": "aarch64"}, "arch='aarch64'"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_and_runs_nothing(backend: SmolvmBackend, keywords: dict[str, Any], why: str) -> None:
    refusal = backend.unsupported_reason(MachineSpec(source="smolvm", **keywords))
    assert refusal is not None
    assert why in refusal
    assert (
        backend.unsupported_reason(MachineSpec(source="smolvm", network=["10.0.0.0/8"], disk="4G", nested=True, ports=[80], env={"A": "b"}))
        is None
    )


def test_sources_are_names_references_archives_folders_and_packs(
    backend: SmolvmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web.tar").write_bytes(b"archive")
    (tmp_path / "dev.smolmachine").write_bytes(b"pack")
    (tmp_path / "rootfs" / "etc").mkdir(parents=True)
    found = {
        source: backend.find_image(source)
        for source in ("debian-12", "smolvm", "alpine-3.20", "python:3.12", "web", "./rootfs/", "./dev.smolmachine")
    }
    assert {source: (image.reference, image.quick) for source, image in found.items()} == {
        "debian-12": ("", True),
        "smolvm": ("", True),
        "alpine-3.20": ("alpine:3.20", False),
        "python:3.12": ("python:3.12", False),
        "web": (f"{tmp_path}/web.tar", False),
        "./rootfs/": (f"{tmp_path}/rootfs/", False),
        "./dev.smolmachine": (f"{tmp_path}/dev.smolmachine", True),
    }
    (tmp_path / "rootfs" / "etc" / "new").touch()
    assert backend.find_image("./rootfs/").digest != found["./rootfs/"].digest
    with pytest.raises(SpecError, match=r"nothing\.tar"):
        backend.find_image("./nothing.tar")


def test_a_host_without_it_is_told_and_one_whose_kvm_runs_nothing_is_asked_once(
    backend: SmolvmBackend, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as nothing:
        nothing.setenv("PATH", str(tmp_path / "empty"))
        nothing.setattr("pytest_vmbottle.backends.smolvm.program._WHEEL", ("no_such_package", "smol-vmm"))
        with pytest.raises(BackendUnavailable, match="smol-machines"):
            backend.probe()
    evidence = "agent did not become ready within 30 seconds: no boot progress"
    failed = json.dumps({"error": {"code": "SMOLVM_ERROR", "message": evidence}})
    start = f"case $2 in start) echo x >> {tmp_path}/starts; echo '{failed}' >&2; exit 1 ;; esac"
    monkeypatch.setenv(VARIABLE, str(script(f"{program('smolvm 1.32.2')}\n{start}")))
    monkeypatch.setattr("pytest_vmbottle.backends.smolvm.backend._DEVICE", Path(os.devnull))
    for _ in range(2):
        again = SmolvmBackend(state=tmp_path / "s", proofs=tmp_path / "proofs")
        with pytest.raises(BackendUnavailable, match="no boot progress"):
            again.probe()
    assert (tmp_path / "starts").read_text() == "x\n"


def test_a_kind_of_pack_that_the_version_does_not_know_is_refused(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = HELP.replace("branch", "fork  ")
    monkeypatch.setenv(VARIABLE, str(script(program("smolvm 1.0.3", old))))
    backend = SmolvmBackend(state=tmp_path / "s", proofs=tmp_path / "proofs", pack_kind=PackKind.TEMPLATE)
    monkeypatch.setattr(backend, "_prove", lambda: Proved(works=True, evidence="a command ran in a guest", seconds=1.0))
    with pytest.raises(BackendUnavailable, match="branch"):
        backend.probe()


# -- the process of a machine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 0),
        ("""echo '{"error":{"code":"NOT_FOUND","message":"vm not found: vm-1"}}' >&2; exit 1""", 0),
        ("""[ -e "$0.2" ] && exit; touch "$0.2"; echo '{"error":{"code":"X","message":"database is locked"}}' >&2; exit 1""", 0),
        ("""echo '{"error":{"code":"SMOLVM_ERROR","message":"it is too busy"}}' >&2; exit 5""", 5),
        ("echo killed >&2; exit 137", 137),
    ],
)
def test_what_ends_a_machine_succeeds_when_there_is_none_any_more(
    body: str, *, status: int, script: Script, backend: SmolvmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletes = f"case $2 in delete) {body or ':'} ;; esac"
    monkeypatch.setenv(VARIABLE, str(script(f"{program('smolvm 1.32.2')}\n{deletes}")))
    ending = backend.ending(tmp_path / "run" / "7-x" / "vm-1")
    assert subprocess.run(ending, check=False, cwd="/").returncode == status
    asked = words(tmp_path)
    assert (asked[:3], asked[-1]) == (["machine", "delete", "-f"], "vm-1")


def test_the_process_of_a_machine_whose_owner_died_is_proven_to_be_its_own_and_smolvm_forgets_the_machine(
    script: Script, backend: SmolvmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = 'case $2 in start) sleep 60 </dev/null >/dev/null 2>&1 & echo "PID: $!" ;; esac'
    monkeypatch.setenv(VARIABLE, str(script(f"{program('smolvm 1.32.2')}\n{starts}")))
    rundir = tmp_path / "run" / "7-x" / "vm-1"
    rundir.mkdir(parents=True)
    pid = backend.engine.of(rundir).start("vm-1")
    other = backend.engine.start("warm-1")
    record = Record(owner=Identity(pid=7, ticks=1, boot="another"), process=Identity.of(pid), ending=backend.ending(rundir))
    rundir.with_name("vm-1.json").write_bytes(record.dump())
    try:
        found = reap(rundir.parent, aside=tmp_path / "aside")
        assert (found.machines, found.processes, found.kept) == (("vm-1",), (pid,), ())
        assert words(tmp_path)[:3] == ["machine", "delete", "-f"]
        assert Identity.of(other) is not None
        assert not rundir.parent.exists()
    finally:
        Vmm(other).kill()


def test_a_process_is_known_by_more_than_its_number() -> None:
    assert not is_dead(me())
    pid, began, boot = me().split(".")
    assert is_dead(f"{pid}.{int(began) - 1}.{boot}")
    assert is_dead(f"{pid}.{began}.00000000")
    assert not is_dead("")
    assert not is_dead("somebody else's label")


def test_a_machine_on_a_leash_ends_when_who_holds_it_lets_that_go() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        vmm = Vmm(process.pid, leash=True)
        assert vmm.is_running
        assert vmm._leash is not None
        assert vmm._leash.stdin is not None
        vmm._leash.stdin.close()  # as the kernel does when we die
        assert vmm.wait(Deadline(10))
        assert process.wait(60) == -9
        vmm.let_go()


def test_a_machine_that_is_let_go_runs_on() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        vmm = Vmm(process.pid, leash=True)
        vmm.let_go()
        assert not vmm.wait(Deadline(0.3))
        process.kill()


def test_a_console_is_followed_into_the_machines_folder_also_when_it_begins_anew(tmp_path: Path) -> None:
    source, target = tmp_path / "agent-console.log", tmp_path / "console.log"
    follower = Follower(source, target)
    source.write_text("first\n")
    follower.catch_up()
    source.unlink()
    source.write_text("2\n")
    follower.close()
    assert target.read_text() == "first\n2\n"
