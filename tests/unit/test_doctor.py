"""What the doctor says of hosts that lack something: search paths, limits and folders made for the purpose."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from pytest_vmbottle.backends.port import Capabilities
from pytest_vmbottle.backends.qemu import QemuBackend, backend
from pytest_vmbottle.backends.qemu import checks as qemu
from pytest_vmbottle.backends.qemu.checks import QemuChecks
from pytest_vmbottle.backends.qemu.command_line import KVM
from pytest_vmbottle.backends.qemu.proof import ProbeResult
from pytest_vmbottle.backends.smolvm.checks import ProbeResult as SmolvmVerdict
from pytest_vmbottle.backends.smolvm.checks import SmolvmChecks
from pytest_vmbottle.backends.smolvm.program import Program
from pytest_vmbottle.catalog import checks as catalog
from pytest_vmbottle.doctor import Finding, State, can_run, examine
from pytest_vmbottle.errors import BackendUnavailable
from pytest_vmbottle.host import checks as computer
from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.account import Account, user_name
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.findings import Answer, Check
from pytest_vmbottle.settings import Settings
from pytest_vmbottle.spec.pack_kind import PackKind

QEMU = f"qemu-system-{host_arch()}"
TOPICS = {
    *("system", "qemu", "qemu-img", "accelerator", "packs", "catalog", "disk space", "memory", "setpriv", "rights", "open files"),
    *("mmdebstrap", "user namespaces", "archive keys", "smolvm", "smolvm machines"),
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in the search path; it is empty."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)


def settings(**said: str) -> Settings:
    return Settings.read(lambda setting: said.get(setting.key))


def findings(root: Path, **said: str) -> dict[str, Finding]:
    return {finding.topic: finding for finding in examine(root, settings(**said))}


def asked(checks: tuple[Check, ...], topic: str) -> Finding:
    return next(check for check in checks if check.topic == topic).find()


@attrs.frozen(kw_only=True)
class Qemu:
    """A QEMU that proved what it is said to, by KVM."""

    account: Account | None = None
    kind: PackKind = PackKind.TEMPLATE
    broken: PackKind | None = None
    refusal: str = ""
    chosen: bool = True

    def find(self, topic: str) -> Finding:
        checks = QemuChecks(
            wanted="auto",
            account=self.account,
            prove=lambda: [ProbeResult(accelerator=KVM, works=True, evidence="did its work")],
            emulator=self._emulator,
            probe=lambda: Capabilities(
                backend="qemu",
                version="",
                accelerator="kvm",
                reason="",
                pack_kind=self.kind,
                pack_reason="as requested",
                emulated=False,
            ),
            broken=lambda: {} if self.broken is None else {self.broken: "its RAM was lost"},
            chosen=self.chosen,
        )
        return asked(checks.all(), topic)

    def _emulator(self) -> None:
        if self.refusal:
            raise BackendUnavailable(self.refusal, "")


@pytest.mark.usefixtures("programs")
def test_a_host_without_any_program_is_told_what_to_install(tmp_path: Path) -> None:
    found = findings(tmp_path / "catalog")

    assert set(found) == TOPICS
    assert found["qemu"].state == found["qemu-img"].state == found["accelerator"].state == State.MISSING
    assert QEMU in found["qemu"].text
    assert found["qemu"].remedy == "sudo apt-get install qemu-system-x86 qemu-utils"
    assert found["qemu-img"].remedy == "sudo apt-get install qemu-utils"
    assert found["packs"].state is State.UNKNOWN
    assert found["setpriv"].state is State.DEGRADED
    assert found["setpriv"].remedy == "sudo apt-get install util-linux"
    assert not can_run(found.values())


@pytest.mark.parametrize(("arch", "package"), [("x86_64", "qemu-system-x86"), ("aarch64", "qemu-system-arm")])
def test_each_architecture_is_asked_for_the_devices_of_its_own_machines(
    arch: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu, "host_arch", lambda: arch)
    there = Qemu().find("qemu")
    monkeypatch.setenv("PATH", str(tmp_path))
    gone = Qemu().find("qemu")

    assert there.state is State.OK, there.text
    assert "virtio-blk-pci" in there.details["has"]
    assert ("isa-serial" in there.details["has"]) == (arch == "x86_64")
    assert (gone.state, gone.remedy) == (State.MISSING, f"sudo apt-get install {package} qemu-utils")


def test_an_architecture_without_machines_is_told_and_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "host_arch", lambda: "riscv64")
    monkeypatch.setattr(backend, "host_arch", lambda: "riscv64")
    found = findings(tmp_path / "catalog")

    for topic in ("qemu", "accelerator"):
        assert found[topic].state is State.MISSING
        assert "riscv64" in found[topic].text
    assert not can_run(found.values())


@pytest.mark.usefixtures("programs")
def test_missing_tools_for_building_images_do_not_keep_machines_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    found = findings(tmp_path / "catalog")

    assert found["mmdebstrap"].state is State.DEGRADED
    assert "mke2fs" in found["mmdebstrap"].text
    assert "e2fsprogs mmdebstrap" in found["mmdebstrap"].remedy
    assert can_run([found["mmdebstrap"], found["setpriv"], found["user namespaces"], found["archive keys"]])


def test_a_qemu_for_other_processors_is_named(programs: Path, tmp_path: Path) -> None:
    program(programs / "qemu-system-sparc64", "exit 1")
    found = findings(tmp_path / "catalog")["qemu"]

    assert found.state is State.MISSING
    assert "qemu-system-sparc64" in found.text
    assert found.details["others"] == ["qemu-system-sparc64"]


@pytest.mark.parametrize(("text", "told"), [("echo hello", "'hello'"), ("exit 127", "status 127")])
def test_a_program_that_is_not_qemu_is_missing(text: str, told: str, programs: Path, tmp_path: Path) -> None:
    program(programs / QEMU, text)
    program(programs / "qemu-img", "echo qemu-img version 99.1")
    found = findings(tmp_path / "catalog")

    assert found["qemu"].state is State.MISSING
    assert told in found["qemu"].text
    assert found["accelerator"].state is State.MISSING
    assert found["qemu-img"].state is State.OK
    assert found["qemu-img"].details["version"] == "qemu-img version 99.1"


def test_what_qemu_was_built_without_is_found_by_asking_it(programs: Path, tmp_path: Path) -> None:
    answers = {
        "--version": "QEMU emulator version 99.1",
        "-accel": "Accelerators supported in QEMU binary:\\ntcg\\nkvm",
        "-device": 'Misc devices:\\nname "pvpanic-pci", bus PCI\\nname "virtio-rng-pci", bus PCI, alias "virtio-rng"',
        "-netdev": "Available netdev backend types:\\nsocket\\nuser",
    }
    cases = "\n".join(f"{word}) printf '{answer}\\n' ;;" for word, answer in answers.items())
    program(programs / QEMU, f'case "$1" in\n{cases}\nesac')
    found = findings(tmp_path / "catalog")["qemu"]

    assert found.state is State.MISSING
    assert "virtio-blk-pci" in found.text
    assert "pvpanic" not in found.text
    assert found.details["accelerators"] == ["kvm", "tcg"]
    assert found.details["has"]["virtio-rng-pci"]
    assert found.details["has"]["user network"]
    assert not found.details["has"]["virtserialport"]


def test_a_qemu_img_that_hangs_is_given_up(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "TOOL_SECONDS", 0.2)
    program(programs / "qemu-img", "while :; do :; done")
    found = findings(tmp_path / "catalog")["qemu-img"]

    assert found.state is State.MISSING


def test_a_setpriv_that_cannot_end_processes_with_their_parent_is_told(programs: Path, tmp_path: Path) -> None:
    program(programs / "setpriv", "echo 'unrecognized option: pdeathsig' >&2; exit 1")
    found = findings(tmp_path / "catalog")["setpriv"]

    assert found.state is State.DEGRADED
    assert "--pdeathsig" in found.text


@pytest.mark.usefixtures("programs")
def test_a_catalog_that_cannot_be_used_is_missing_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = findings(tmp_path / "file")

    assert found["catalog"].state is State.MISSING
    assert str(tmp_path / "file") in found["catalog"].text
    assert found["catalog"].remedy.startswith("export VMBOTTLE_CATALOG=")
    assert found["disk space"].details["path"] == str(tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("programs")
def test_a_catalog_on_a_network_file_system_is_refused_with_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = host.file_system(tmp_path)
    assert kind
    assert findings(tmp_path / "catalog")["catalog"].state is State.OK
    monkeypatch.setattr(host, "_NETWORK", frozenset({kind}))
    found = findings(tmp_path / "catalog")["catalog"]

    assert found.state is State.MISSING
    assert kind in found.text


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("limits", "state", "remedy"),
    [
        ((1 << 10, 1 << 9), State.OK, ""),
        ((1 << 60, 1 << 9), State.DEGRADED, "vmbottle pack prune --older-than 7d"),
        ((1 << 60, 1 << 60), State.MISSING, "vmbottle pack prune"),
    ],
)
def test_disk_space_is_judged_by_what_images_and_packs_take(
    limits: tuple[int, int], state: State, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_LITTLE_SPACE", limits[0])
    monkeypatch.setattr(catalog, "_NO_SPACE", limits[1])
    found = findings(tmp_path / "not" / "there")["disk space"]

    assert found.state is state
    assert found.remedy == remedy
    assert 0 < found.details["free"] <= found.details["total"]


@pytest.fixture
def few_files() -> Iterator[int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("programs")
def test_a_low_limit_of_open_files_is_told_with_what_raises_it(few_files: int, tmp_path: Path) -> None:
    found = findings(tmp_path / "catalog")["open files"]

    assert found.state is State.DEGRADED
    assert str(few_files) in found.text
    assert found.remedy.endswith("4096")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("user", "chosen", "state", "told"),
    [
        (0, "", State.DEGRADED, "root"),
        (0, "nobody", State.DEGRADED, "other"),
        (0, "4711:4711", State.OK, "4711:4711"),
        (1000, "", State.OK, "QEMU"),
        (1000, "nobody", State.OK, "QEMU"),
    ],
)
def test_whose_rights_qemu_has_is_told(  # noqa: PLR0917
    user: int, chosen: str, state: State, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    found = findings(tmp_path / "catalog", run_as=chosen)["rights"]

    assert found.state is state
    assert told in found.text
    assert ("VMBOTTLE_RUN_AS=vmbottle" in found.remedy) is (state is State.DEGRADED)


def test_a_user_who_may_not_use_kvm_keeps_qemu_from_running_machines() -> None:
    found = Qemu(refusal="QEMU cannot run as 'joe': this user may not open /dev/kvm").find("accelerator")

    assert (found.state, found.text, found.stops) == (State.MISSING, "QEMU cannot run as 'joe': this user may not open /dev/kvm", True)
    assert found.remedy.startswith("export VMBOTTLE_ACCEL=tcg")


def test_qemu_is_checked_as_the_user_that_it_is_to_run_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(name="joe", uid=1000, gid=1000, groups=())
    proved = [ProbeResult(accelerator=KVM, works=True, evidence="did its work")]
    monkeypatch.setattr(QemuBackend, "prove_again", lambda _: attrs.make_class("Proved", ["verdicts"])(proved))
    monkeypatch.setattr(Account, "may_open", lambda *_: False)
    monkeypatch.setattr(backend._Prover, "emulator", attrs.make_class("Emulated", ["accelerator"])(KVM))

    found = asked(QemuBackend(account=account, proofs=tmp_path).checks(chosen=True), "accelerator")
    assert found.text == "QEMU cannot run as 'joe': this user may not open /dev/kvm"
    assert asked(QemuBackend(proofs=tmp_path).checks(chosen=True), "accelerator").text == "using KVM: a guest did its work"


def test_a_kind_of_pack_that_was_asked_for_and_does_not_work_is_told() -> None:
    found = Qemu(kind=PackKind.STREAM, broken=PackKind.STREAM).find("packs")

    assert (found.state, found.remedy) == (State.DEGRADED, "export VMBOTTLE_PACK=auto")
    assert found.text == "stream packs, as requested, do not work here: its RAM was lost"
    assert Qemu(broken=PackKind.STREAM).find("packs").state is State.OK


@pytest.mark.parametrize("works", [True, False])
def test_machines_of_smolvm_are_needed_where_it_was_chosen(*, works: bool) -> None:
    def checks(*, chosen: bool) -> SmolvmChecks:
        program = Program(path=Path("/smolvm"), version="1.32", verbs=frozenset())
        return SmolvmChecks(
            find=lambda: program, prove=lambda: SmolvmVerdict(works=works, evidence="a command ran", seconds=1), chosen=chosen
        )

    assert asked(checks(chosen=True).all(), "smolvm machines").stops is not works
    assert not asked(checks(chosen=False).all(), "smolvm machines").stops


@pytest.mark.usefixtures("programs")
def test_a_backend_that_was_not_chosen_keeps_no_machine_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBOTTLE_SMOLVM", "/not/there")
    by_default, by_smolvm = (findings(tmp_path / "catalog", backend=name) for name in ("auto", "smolvm"))

    assert (by_default["smolvm"].state, by_smolvm["smolvm"].state) == (State.OK, State.MISSING)
    assert {topic for topic, found in by_default.items() if found.stops} == {"qemu", "qemu-img", "accelerator"}
    assert {topic for topic, found in by_smolvm.items() if found.stops} == {"smolvm"}


@pytest.mark.usefixtures("programs")
def test_what_a_backend_of_a_plugin_needs_is_not_known_here(tmp_path: Path) -> None:
    found = findings(tmp_path / "catalog", backend="firecracker")

    assert list(found)[-1] == "backend"
    assert found["backend"].state is State.UNKNOWN
    assert "firecracker comes with a plugin" in found["backend"].text
    assert can_run(found.values())


def test_what_a_memory_budget_leaves_is_told() -> None:
    found = asked(computer.checks(512 << 20), "memory")

    assert found.state is State.DEGRADED
    assert ", and their budget is 512 MiB: run few machines at once" in found.text
    assert found.details["budget"] == 512 << 20


def test_a_question_that_breaks_is_unknown_and_the_others_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise ZeroDivisionError("no memory to speak of")

    monkeypatch.setattr(host, "available_memory", broken)
    found = findings(tmp_path / "catalog")

    assert found["memory"].state is State.UNKNOWN
    assert "ZeroDivisionError: no memory to speak of" in found["memory"].text
    assert set(found) == TOPICS
    assert found["open files"].state is not State.UNKNOWN


@pytest.mark.usefixtures("programs")
def test_findings_are_fit_for_json(tmp_path: Path) -> None:
    found = examine(tmp_path / "catalog", settings())

    assert json.loads(json.dumps([attrs.asdict(each) for each in found]))[1]["state"] == "missing"


@pytest.mark.parametrize("state", State)
def test_machines_can_be_run_unless_what_they_need_is_missing_or_unknown(state: State) -> None:
    needed, other = (Check("it", lambda: Answer(state, "", {}), needed=needed).find() for needed in (True, False))

    assert can_run([needed]) is (state in (State.OK, State.DEGRADED))
    assert can_run([other])


@pytest.mark.usefixtures("programs")
def test_machines_need_a_system_qemu_and_a_catalog_with_room(tmp_path: Path) -> None:
    needed = {finding.topic for finding in examine(tmp_path / "catalog", settings()) if finding.needed}

    assert needed == {"system", "qemu", "qemu-img", "accelerator", "catalog", "disk space"}


@pytest.mark.usefixtures("programs")
def test_little_memory_is_told_and_which_limit_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    group = host.ControlGroup(limit=512 << 20, used=412 << 20)
    monkeypatch.setattr(host, "control_groups", lambda: (group,))
    answer = asked(computer.checks(None), "memory")

    assert answer.state is State.DEGRADED
    assert "100 MiB of 512 MiB" in answer.text
    assert answer.details["control_groups"] == [{"limit": 512 << 20, "used": 412 << 20}]


def test_another_system_than_linux_runs_no_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(computer.checks(None), "system").state is State.OK
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    answer = asked(computer.checks(None), "system")

    assert answer.state is State.MISSING
    assert "Darwin" in answer.text
    assert not can_run([answer])


def test_a_missing_kvm_device_is_brought_by_its_module(tmp_path: Path) -> None:
    assert computer.kvm_remedy(tmp_path / "kvm", tmp_path / "misc").startswith("sudo modprobe kvm_")


def test_a_kvm_device_that_only_the_container_lacks_is_to_be_given_to_it(tmp_path: Path) -> None:
    (tmp_path / "misc").write_text("183 hw_random\n232 kvm\n")

    assert computer.kvm_remedy(tmp_path / "kvm", tmp_path / "misc").startswith("docker run --device /dev/kvm")


def test_a_kvm_device_that_the_group_kvm_may_use_takes_joining_that_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o660)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(Path, "group", lambda _: "kvm")
    assert computer.kvm_remedy(device) == f"sudo usermod -aG kvm {user_name()}  # then log in again"

    device.chmod(0o600)
    assert "/etc/udev/rules.d/99-kvm.rules" in computer.kvm_remedy(device)


def test_in_continuous_integration_nobody_logs_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    (tmp_path / "kvm").touch()
    remedy = computer.kvm_remedy(tmp_path / "kvm")

    assert 'MODE="0666"' in remedy
    assert "usermod" not in remedy


def test_a_kvm_device_of_another_group_takes_a_udev_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    device = tmp_path / "kvm"
    device.touch()
    remedy = computer.kvm_remedy(device)

    assert remedy.startswith("""echo 'KERNEL=="kvm", GROUP="kvm", MODE="0660\"""")
    assert "udevadm control --reload" in remedy
