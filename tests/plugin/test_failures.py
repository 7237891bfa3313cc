"""Reports of failed tests with machines, and the artifacts that they leave."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vmbottle.report.run import MARK, ArtifactsError, TestArtifacts, read_run

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., pytest.RunResult]

FAILS = """
@pytest.mark.vm("debian-12")
def test_it(vm):
    vm.exec(["echo", "before"])
    vm.path("/srv/x").write_bytes(b"123")
    vm.note("now it breaks")
    assert 1 + 1 == 3
"""
JOURNAL = """
from pytest_vmbottle.channels.port import Finished

def answer(command):
    said = ""
    if "journalctl" in " ".join(command.argv):
        import datetime as dt
        now = dt.datetime.now(dt.UTC).strftime("%a %Y-%m-%d %H:%M:%S UTC")
        said = f"{now} d web.service[5]: no module named nothing\\n{now} d init.scope[1]: web.service: Failed with result 'exit-code'.\\n"
    return Finished(returncode=7 if "exit 7" in " ".join(command.argv) else 0, stdout=said.encode())

def pytest_vmbottle_make_backend(config, name):
    return FakeBackend(answer)
"""


def said(result: pytest.RunResult) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", result.stdout.str() + "\n" + result.stderr.str())


def artifacts(pytester: pytest.Pytester, folder: str = "vmbottle-artifacts") -> list[TestArtifacts]:
    return read_run(pytester.path / folder)


def phases(test: TestArtifacts, machine: str = "vm") -> list[str]:
    return [f"{event['phase']} {event['state']}" for event in test.events() if event["kind"] == "phase" and event["machine"] == machine]


def test_a_failed_test_shows_its_last_commands_and_where_its_artifacts_are(run: Run, pytester: pytest.Pytester) -> None:
    text = said(run(FAILS, status=1, failed=1))
    (test,) = artifacts(pytester)

    commands = text[text.index("vm: last commands") :]
    assert re.search(r"echo before .*\n.*write_bytes /srv/x.*\n.*now it breaks", commands)
    assert f"vmbottle-artifacts/{test.folder.name}" in text
    assert "silence" not in text


def test_the_short_summary_begins_with_the_error_and_not_with_its_module(run: Run) -> None:
    text = said(run('@pytest.mark.vm("debian-12")\ndef test_it(vm): vm.link(False)\n', status=1, failed=1))

    assert re.search("^FAILED test_it.py::test_it - Unsupported: ", text, re.MULTILINE)


def test_a_passed_test_shows_and_leaves_nothing(run: Run, pytester: pytest.Pytester) -> None:
    text = said(run('@pytest.mark.vm("debian-12")\ndef test_it(vm): vm.exec("true")\n', "-rA", passed=1))

    assert "last commands" not in text
    assert not (pytester.path / "vmbottle-artifacts").exists()


def test_units_that_failed_during_the_test_are_told(run: Run, pytester: pytest.Pytester) -> None:
    text = said(run(FAILS, conftest=JOURNAL, status=1, failed=1))
    (test,) = artifacts(pytester)

    assert re.search(r"vm: units .*\n.*web.service:\n *no module named nothing\n", text)
    assert "no module named nothing" in (test.folder / "vm" / "journal.txt").read_text()


def test_the_end_of_a_failed_commands_output_is_told_unless_the_error_has_it(run: Run) -> None:
    command = '@pytest.mark.vm("debian-12")\ndef test_it(vm):\n    vm.exec("exit 7", check=False)\n    assert False\n'
    text = said(run(command, conftest=JOURNAL, status=1, failed=1))

    assert re.search(r"exit 7': status 7", text)


def test_artifacts_have_the_test_and_each_machine(run: Run, pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.vm("debian-12", name="one", env={"TOKEN": "s3cret"})
@pytest.mark.vm("debian-12", name="two")
def test_it(vms):
    vms["two"].exec(["true"])
    raise RuntimeError("it broke")
"""
    run(text, status=1, failed=1)
    (test,) = artifacts(pytester)

    assert (test.nodeid, test.outcome, test.phase, test.error) == ("test_it.py::test_it", "failed", "call", "RuntimeError: it broke")
    assert test.machines == {"one": "one", "two": "two"}
    assert "RuntimeError" in test.traceback
    assert test.began < test.ended
    events = list(test.events())
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert {"launch", "true"} <= {event.get("verb", event.get("argv", [""])[0]) for event in events if event["machine"] == "two"}
    assert phases(test, "one") == ["setup passed", "call began", "call failed", "teardown began", "teardown passed"]
    facts = json.loads((test.folder / "one" / "machine.json").read_text())
    assert (facts["name"], facts["backend"], facts["spec"]["env"]) == ("one", "fake", ["TOKEN"])
    assert (test.folder / "two" / "console.txt").is_file()
    assert [path.name for path in test.files() if b"s3cret" in path.read_bytes()] == ["test.json"]  # the test's own source


@pytest.mark.parametrize(("when", "kept"), [("never", []), ("failed", ["failed"]), ("always", ["failed", "passed"])])
def test_artifacts_are_kept_of_the_tests_that_the_option_says(run: Run, pytester: pytest.Pytester, when: str, kept: list[str]) -> None:
    text = FAILS + "\n@pytest.mark.vm('debian-12')\ndef test_passes(vm): pass\n\ndef test_without(): assert False\n"
    output = said(run(text, f"--vm-artifacts={when}", "--vm-output=out", status=1, failed=2, passed=1))

    if not kept:
        assert not (pytester.path / "out").exists()
        assert "last commands" in output
    else:
        assert [test.outcome for test in artifacts(pytester, "out")] == kept


def test_a_folder_with_other_files_is_left_alone_and_the_failure_is_still_told(run: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "out").mkdir()
    (pytester.path / "out" / "thesis.txt").write_text("mine")
    text = said(run(FAILS, "--vm-output=out", status=1, failed=1))

    assert [path.name for path in (pytester.path / "out").iterdir()] == ["thesis.txt"]
    assert "assert (1 + 1) == 3" in text
    assert re.search("vmbottle: .*out .*choose another folder", text)


def test_a_run_that_leaves_artifacts_removes_those_of_the_run_before(run: Run, pytester: pytest.Pytester) -> None:
    run(FAILS, status=1, failed=1)
    run(FAILS.replace("test_it", "test_other"), status=1, failed=1)
    run("def test_it(): pass\n", passed=1)

    assert [test.nodeid for test in artifacts(pytester)] == ["test_it.py::test_other"]


def test_names_of_folders_are_safe_and_differ_where_tests_do(run: Run, pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.parametrize("word", ["a/b", "a:b", "A/b", "x" * 300, "..", "\\N{SNOWMAN}", "con", "a b\\n"])
@pytest.mark.vm("debian-12")
def test_it(vm, word):
    assert False
"""
    run(text, status=1, failed=8)
    names = [test.folder.name for test in artifacts(pytester)]

    assert len({name.lower() for name in names}) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) and not name.startswith(".") for name in names)


def test_reruns_of_a_test_have_folders_of_their_own(run: Run, pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_rerunfailures")
    run(FAILS, "-p", "pytest_rerunfailures", "--reruns=2", status=1, failed=1, process=True)

    assert len(artifacts(pytester)) == 3


@pytest.mark.guests
def test_workers_write_one_folder_of_artifacts(run: Run, pytester: pytest.Pytester) -> None:
    text = "@pytest.mark.vm('debian-12')\n@pytest.mark.parametrize('n', range(6))\ndef test_it(vm, n): assert n < 0\n"
    run(text, "-n2", status=1, failed=6)
    tests = artifacts(pytester)

    assert len({test.nodeid for test in tests}) == 6
    assert not [path.name for path in pytester.path.iterdir() if "lock" in path.name]
    assert {test.worker for test in tests} == {"gw0", "gw1"}


def test_a_machine_that_could_not_be_provided_leaves_artifacts_too(run: Run, pytester: pytest.Pytester) -> None:
    run('@pytest.mark.vm("my-image")\ndef test_it(vm): pass\n', status=1, errors=1)
    (test,) = artifacts(pytester)

    assert (test.outcome, test.phase, test.machines) == ("failed", "setup", {})
    assert test.error.startswith("ImageMissing: ")


NEVER_BOOTS = """
import sys
from pytest_vmbottle.errors import MachineTimeout

class Broken(FakeBackend):
    def launch(self, spec, *, source, rundir, deadline):
        instance = super().launch(spec, source=source, rundir=rundir, deadline=deadline)
        {condition}
        instance.argv = ("qemu", "-nographic")
        with (rundir / "console.log").open("a") as console:
            console.writelines(f"line {{number}}\\n" for number in range(100))
        instance.channel = self.fail
        return instance

    def fail(self, **_):
        {failure}

def pytest_vmbottle_make_backend(config, name):
    return Broken()
"""
UNLESS_BUILDING = "if source.building: return instance"
TIMES_OUT = 'raise MachineTimeout("no agent", console_tail="line 99")'


def test_a_machine_that_never_booted_leaves_its_whole_console(run: Run, pytester: pytest.Pytester) -> None:
    broken = NEVER_BOOTS.format(condition=UNLESS_BUILDING, failure=TIMES_OUT)
    text = '@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n'
    run(text, "--vm-infra-retries=0", conftest=broken, status=1, errors=1)
    (test,) = artifacts(pytester)
    lines = (test.folder / "vm" / "console.txt").read_text().splitlines()
    facts = [json.loads((test.folder / name / "machine.json").read_text()) for name in test.machines.values()]

    assert test.phase == "setup"
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(100)]
    # One machine for each kind of packs that was tried.
    assert [each["pack"]["kind"] for each in facts] == ["template", "stream", "disk"]
    assert {len(each["pack"]["key"]) for each in facts} == {64}
    assert [each["argv"] for each in facts] == [["qemu", "-nographic"]] * 3
    events = list(test.events())
    assert {"line 0", "line 99"} <= {event["text"] for event in events if event["kind"] == "console"}
    assert next(event for event in events if event["kind"] == "power")["error"].startswith("MachineTimeout: no agent")


def test_a_machine_that_could_not_build_a_pack_leaves_its_console_with_the_test(run: Run, pytester: pytest.Pytester) -> None:
    broken = NEVER_BOOTS.format(condition="", failure=TIMES_OUT)
    run('@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n', conftest=broken, status=1, errors=1)
    (test,) = artifacts(pytester)

    facts = json.loads((test.folder / "vm" / "machine.json").read_text())

    assert "line 0\n" in (test.folder / "vm" / "console.txt").read_text()
    assert facts["id"].startswith("build-")
    assert facts["pack"] is None


def test_an_interrupted_boot_leaves_artifacts(run: Run, pytester: pytest.Pytester) -> None:
    broken = NEVER_BOOTS.format(condition=UNLESS_BUILDING, failure="os.kill(os.getpid(), 15)\n        signal.pause()")
    text = '@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n'
    run(text, conftest=broken + "\nimport os, signal\n", status=2, process=True)
    (test,) = artifacts(pytester)

    assert (test.phase, test.error, test.machines) == ("setup", "interrupted", {"vm": "vm"})
    assert "line 99" in (test.folder / "vm" / "console.txt").read_text()


def test_a_machine_that_was_tried_again_leaves_both_tries_if_the_test_fails(run: Run, pytester: pytest.Pytester) -> None:
    once = NEVER_BOOTS.format(
        condition="if source.saved is not None or sys.__dict__.setdefault('vmbottle_tried', self) is not self: return instance\n"
        "        sys.vmbottle_tried = None",
        failure=TIMES_OUT,
    )
    text = '@pytest.mark.vm("debian-12", fresh="boot")\ndef test_it(vm): assert False\n'
    run(text, "--vm-infra-retries=1", conftest=once, status=1, failed=1, process=True)
    (test,) = artifacts(pytester)

    assert test.machines == {"vm": "vm", "vm-2": "vm-2"}
    assert ["line 99" in (test.folder / name / "console.txt").read_text() for name in ("vm", "vm-2")] == [False, True]


ENDS_BADLY = """
@pytest.fixture
def bad(vm):
    yield
    vm.exec(["echo", "last"])
    print("printed in teardown")
    raise OSError("it does not end")
"""


def test_a_test_that_fails_and_ends_badly_has_one_folder_with_both_errors(run: Run, pytester: pytest.Pytester) -> None:
    text = ENDS_BADLY + '@pytest.mark.vm("debian-12")\ndef test_it(bad): raise RuntimeError("the call")\n'
    output = said(run(text, "--junitxml=out.xml", status=1, failed=1, errors=1))
    (test,) = artifacts(pytester)
    sections = dict(test.sections)

    assert len(list(test.folder.parent.glob("*/"))) == 1
    assert (test.outcome, test.phase, test.error) == ("failed", "call", "RuntimeError: the call")
    assert "OSError: it does not end" in sections["error in teardown"]
    assert sections["Captured stdout teardown"] == "printed in teardown\n"
    assert phases(test) == ["setup passed", "call began", "call failed", "teardown began", "teardown failed"]
    assert [event.get("verb", event.get("argv")) for event in test.events() if event["kind"] in ("power", "command")] == [
        "launch",
        ["echo", "last"],
        "stop",
    ]
    assert output.count(f"vmbottle-artifacts/{test.folder.name}") == 2
    # JUnit's XML has a case for each of the two errors.
    named = re.findall('name="vmbottle_artifacts" value="([^"]+)"', (pytester.path / "out.xml").read_text())
    assert named == [f"vmbottle-artifacts/{test.folder.name}"] * 2


def test_a_test_that_only_ends_badly_leaves_what_its_machines_did(run: Run, pytester: pytest.Pytester) -> None:
    text = ENDS_BADLY + '@pytest.mark.vm("debian-12")\ndef test_it(bad, module_vm): pass\n'
    run(text, status=1, passed=1, errors=1)
    (test,) = artifacts(pytester)

    assert (test.outcome, test.phase, test.error) == ("failed", "teardown", "OSError: it does not end")
    assert len(test.machines) == 2
    assert "vm started" in (test.folder / "vm" / "console.txt").read_text()
    assert ["echo", "last"] in [event.get("argv") for event in test.events()]


def test_a_passed_test_that_is_kept_has_its_end_too(run: Run, pytester: pytest.Pytester) -> None:
    run('@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n', "--vm-artifacts=always", passed=1)
    (test,) = artifacts(pytester)

    assert (test.outcome, test.phase) == ("passed", "call")
    assert phases(test)[-2:] == ["teardown began", "teardown passed"]
    assert [event["verb"] for event in test.events() if event["kind"] == "power"] == ["launch", "stop"]


def test_remains_that_cannot_be_read_are_told_and_hide_nothing(run: Run) -> None:
    broken = """
from pytest_vmbottle.plugin import evidence

def read_remains(remains, *, since):
    raise OSError("the disk is gone")

@pytest.fixture(autouse=True)
def _unreadable(monkeypatch):
    monkeypatch.setattr(evidence, "read_remains", read_remains)
    yield
"""
    output = said(run('@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n', conftest=broken, passed=1, process=True))

    assert "what the machine 'vm' left could not be kept: the disk is gone" in output


def test_each_rerun_of_a_test_that_also_ends_badly_has_one_folder(run: Run, pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_rerunfailures")
    text = ENDS_BADLY + '@pytest.mark.vm("debian-12")\ndef test_it(bad): assert False\n'
    run(text, "-p", "pytest_rerunfailures", "--reruns=1", status=1, process=True)

    assert [phases(test)[-1] for test in artifacts(pytester)] == ["teardown failed"] * 2


def test_an_interruption_between_tests_leaves_nothing_of_the_one_that_passed(run: Run, pytester: pytest.Pytester) -> None:
    stop = "\ndef pytest_runtest_logfinish(): raise KeyboardInterrupt\n"
    run('@pytest.mark.vm("debian-12")\ndef test_it(vm): pass\n', conftest=stop, status=2, process=True)

    assert not (pytester.path / "vmbottle-artifacts").exists()


def test_user_data_is_described_without_its_passwords(run: Run, pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.vm("debian-12", user_data={"password": "swordfish-" + "7"}, run=["echo 'quo\\\\ted" + "'; true"])
def test_it(vm):
    vm.redact("'quo\\\\ted" + "'")
    raise RuntimeError
"""
    run(text, status=1, failed=1)
    (test,) = artifacts(pytester)
    facts = json.loads((test.folder / "vm" / "machine.json").read_text())

    assert facts["spec"]["user_data"]["kind"] == "#cloud-config"
    assert re.fullmatch("[0-9a-f]{64}", facts["spec"]["user_data"]["sha256"])
    # Escaped in JSON, it would not have been found in the text of the file.
    assert "echo [redacted]; true" in str(facts["spec"])
    assert not [path for path in test.files() if b"swordfish-7" in path.read_bytes()]


def test_two_machines_of_one_name_both_have_their_files(run: Run, pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.vm("debian-12")
def test_it(vm, vm_factory):
    vm_factory("debian-12", name="vm")
    assert False
"""
    run(text, status=1, failed=1)
    (test,) = artifacts(pytester)

    assert set(test.machines.values()) == {"vm", "vm-2"}
    assert all((test.folder / name / "console.txt").is_file() for name in test.machines.values())


def test_only_events_of_the_test_are_in_its_timeline(run: Run, pytester: pytest.Pytester) -> None:
    text = """
pytestmark = pytest.mark.vm("debian-12")

def test_one(module_vm):
    module_vm.exec(["echo", "first"])

def test_two(module_vm):
    module_vm.exec(["echo", "second"])
    assert False
"""
    run(text, "-p", "no:randomly", status=1, failed=1, passed=1)
    (test,) = artifacts(pytester)

    assert [event["argv"][1] for event in test.events() if event["kind"] == "command"] == ["second"]


def test_the_run_ends_with_where_its_report_is(run: Run, pytester: pytest.Pytester) -> None:
    text = said(run(FAILS, status=1, failed=1))

    assert "vmbottle: artifacts of 1 test: vmbottle-artifacts/index.html" in text
    assert "now it breaks" in (pytester.path / "vmbottle-artifacts" / "index.html").read_text()
    trace = json.loads((pytester.path / "vmbottle-artifacts" / "trace.json").read_text())
    assert any("now it breaks" in event["name"] for event in trace["traceEvents"])
    assert "artifacts of" not in said(run("def test_it(): pass\n", passed=1))


def test_junit_names_the_folder_of_the_artifacts(run: Run, pytester: pytest.Pytester) -> None:
    run(FAILS, "--junitxml=out.xml", status=1, failed=1)
    (test,) = artifacts(pytester)

    assert f'<property name="vmbottle_artifacts" value="vmbottle-artifacts/{test.folder.name}"' in (pytester.path / "out.xml").read_text()


def test_the_html_report_of_pytest_html_links_the_artifacts(run: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "out").mkdir()
    run(FAILS, "-p", "pytest_html.plugin", "-p", "pytest_metadata.plugin", "--html=out/report.html", status=1, failed=1, process=True)
    (test,) = artifacts(pytester)

    assert f"../vmbottle-artifacts/{test.folder.name}/vm/console.txt" in (pytester.path / "out" / "report.html").read_text()


def test_allure_gets_the_artifacts_as_attachments(run: Run, pytester: pytest.Pytester) -> None:
    run(FAILS, "-p", "allure_pytest.plugin", "--alluredir=out", status=1, failed=1, process=True)
    (result,) = [json.loads(path.read_text()) for path in (pytester.path / "out").glob("*-result.json")]

    assert {"timeline.jsonl", "vm/console.txt"} <= {each["name"] for each in result["attachments"]}


def test_hooks_add_files_and_know_whether_the_test_failed(run: Run, pytester: pytest.Pytester) -> None:
    hooks = """
def pytest_vmbottle_artifacts(machine, folder, report):
    (folder / "mine.txt").write_text(f"{machine.name} {report.when}")

def pytest_vmbottle_machine_stopping(machine, failed):
    with open("stopped", "a") as file:
        file.write(f"{failed}\\n")
"""
    text = FAILS + "\n@pytest.mark.vm('debian-12')\ndef test_passes(vm): pass\n"
    run(text, "-p", "no:randomly", conftest=hooks, status=1, failed=1, passed=1)
    (test,) = artifacts(pytester)

    assert (test.folder / "vm" / "mine.txt").read_text() == "vm call"
    assert (pytester.path / "stopped").read_text() == "True\nFalse\n"


def test_a_hook_that_fails_hides_nothing(run: Run, pytester: pytest.Pytester) -> None:
    text = said(run(FAILS, conftest="\ndef pytest_vmbottle_artifacts(machine): raise OSError('full')\n", status=1, failed=1))

    assert "assert (1 + 1) == 3" in text
    assert re.search("vmbottle: a hook failed .*full", text)
    assert len(artifacts(pytester)) == 1


def test_a_hypervisor_that_cannot_tell_its_state_hides_nothing(run: Run, pytester: pytest.Pytester) -> None:
    broken = """
from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.testing import FakeInstance

def state(self):
    raise VMBottleError("the monitor is silent")

@pytest.fixture
def silent(monkeypatch):
    return lambda: monkeypatch.setattr(FakeInstance, "state", state)
"""
    text = '@pytest.mark.vm("debian-12")\ndef test_it(silent, vm):\n    silent()\n    assert 1 + 1 == 3\n'
    output = said(run(text, conftest=broken, status=1, failed=1))

    assert "assert (1 + 1) == 3" in output
    assert "no journal: the monitor is silent" in output
    assert len(artifacts(pytester)) == 1


def test_an_interrupted_test_leaves_artifacts(run: Run, pytester: pytest.Pytester) -> None:
    text = FAILS.replace("assert 1 + 1 == 3", "raise KeyboardInterrupt")
    run(text, status=2, process=True)
    (test,) = artifacts(pytester)

    assert (test.nodeid, test.error) == ("test_it.py::test_it", "interrupted")
    assert [event["text"] for event in test.events() if event["kind"] == "note"] == ["now it breaks"]


def test_a_test_that_pytest_timeout_ends_leaves_artifacts_and_shows_its_own_line(run: Run, pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.vm("debian-12")
def test_it(vm):
    vm.wait_until(lambda: False, timeout=60)
"""
    output = said(run(text, "-p", "pytest_timeout", "--timeout=1", status=1, failed=1, process=True))
    (test,) = artifacts(pytester)

    assert "vm.wait_until(lambda: False, timeout=60)" in output
    assert "waits.py" not in output[output.index("= FAILURES") :]
    assert "Timeout" in test.error
    assert [event["verb"] for event in test.events() if event["kind"] == "wait"] == ["wait_until"]


HANGS = """
@pytest.mark.vm("debian-12")
def test_it(vm):
    vm.note("before")
    vm.wait_until(lambda: False, timeout=60)
"""
THREAD = ("-p", "pytest_timeout", "--timeout=1", "--timeout-method=thread")


def test_a_process_that_pytest_timeout_ends_leaves_artifacts_and_a_report(run: Run, pytester: pytest.Pytester) -> None:
    output = said(run(HANGS, *THREAD, status=1, process=True))
    (test,) = artifacts(pytester)

    assert "Stack of MainThread" in output
    assert (test.phase, test.error) == ("call", "Timeout (>1.0s) from pytest-timeout.")
    assert "vm.wait_until(lambda: False, timeout=60)" in test.traceback
    assert "before" in [event.get("text") for event in test.events()]
    assert "before" in (pytester.path / "vmbottle-artifacts" / "index.html").read_text()


@pytest.mark.guests
def test_artifacts_that_hang_do_not_keep_a_process_that_pytest_timeout_ends(run: Run) -> None:
    hang = """
import threading
from pytest_vmbottle.plugin import failures

failures._LAST_SECONDS = 0.2
failures.keep_unreported = lambda *_: threading.Event().wait(200)
"""
    started = time.monotonic()
    run(HANGS, *THREAD, conftest=hang, status=1, process=True)

    assert time.monotonic() - started < 150


@pytest.mark.guests
def test_a_test_that_ends_in_time_is_left_alone_by_pytest_timeouts_thread(run: Run, pytester: pytest.Pytester) -> None:
    text = HANGS.replace("lambda: False", "lambda: True") + "\ndef test_other():\n    import time\n    time.sleep(1.2)\n"
    run(text, *THREAD[:2], "--timeout=30", THREAD[3], passed=2, process=True)

    assert not (pytester.path / "vmbottle-artifacts").exists()


def test_with_pdb_artifacts_are_there_when_it_stops_and_the_machine_runs(run: Run, pytester: pytest.Pytester) -> None:
    stop = """
import pathlib

class Pdb:
    quitting = False
    def __init__(self, **_): pass
    def reset(self): pass
    def interaction(self, frame, trace):
        trace = getattr(trace, "__traceback__", trace)
        while "vm" not in trace.tb_frame.f_locals:
            trace = trace.tb_next
        machine = trace.tb_frame.f_locals["vm"]
        kept = len(list(pathlib.Path("vmbottle-artifacts").glob("*/test.json")))
        pathlib.Path("stopped").write_text(f"{machine.state} {kept}")
"""
    (pytester.path / "stopper.py").write_text(stop)
    run(FAILS, "--pdb", "--pdbcls=stopper:Pdb", status=1, failed=1, process=True)

    assert (pytester.path / "stopped").read_text() == "running 1"


def test_a_secret_is_in_no_report_and_no_artifact(run: Run, pytester: pytest.Pytester) -> None:
    text = """
@pytest.mark.vm("debian-12")
def test_it(vm):
    secret = "-".join(["correct", "horse"])
    vm.redact(secret)
    vm.exec(["login", secret])
    print(secret)
    assert secret == "wrong"
"""
    output = said(run(text, "--junitxml=out.xml", "-l", status=1, failed=1, process=True))
    (test,) = artifacts(pytester)

    assert "correct-horse" not in output
    assert "[redacted]" in output
    assert "correct-horse" not in (pytester.path / "out.xml").read_text()
    assert not [path for path in test.files() if b"correct-horse" in path.read_bytes()]


def test_values_of_variables_that_the_ini_file_names_are_hidden(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOST_TOKEN", "from-the-host")
    pytester.makeini("[pytest]\nvm_redact =\n    HOST_TOKEN\n    GUEST_TOKEN\n")
    text = """
import os

@pytest.mark.vm("debian-12", env={"GUEST_TOKEN": "of-the-" + "mark"})
def test_it(vm):
    vm.exec(["login", os.environ["HOST_TOKEN"]])
    vm.exec(["use", "in-the-" + "call"], env={"GUEST_TOKEN": "in-the-" + "call", "OTHER": "shown-value"})
    raise RuntimeError("of-the-" + "mark")
"""
    output = said(run(text, status=1, failed=1, process=True))
    (test,) = artifacts(pytester)

    for value in ("from-the-host", "in-the-call", "of-the-mark"):
        assert value not in output
        assert not [path for path in test.files() if value.encode() in path.read_bytes()]
    assert "use '[redacted]'" in output


@pytest.mark.parametrize("full", [False, True])
def test_tracebacks_show_the_test_and_no_frame_of_ours_unless_they_are_full(run: Run, full: bool) -> None:  # noqa: FBT001 - a parameter
    text = """
@pytest.mark.vm("debian-12")
def test_it(vm):
    def check():
        raise ValueError("mine")
    vm.wait_until(check)

@pytest.mark.vm("debian-12")
def test_other(vm):
    vm.link(False)
"""
    output = said(run(text, *(["--full-trace"] if full else []), status=1, failed=2))

    assert ("waits.py" in output) is full
    assert ("machine.py" in output) is full
    assert "raise ValueError" in output
    assert "vm.link(False)" in output


def test_a_folder_without_artifacts_is_told_apart_from_one_with_them(tmp_path: Path) -> None:
    with pytest.raises(ArtifactsError, match="artifacts"):
        read_run(tmp_path)
    (tmp_path / MARK).write_text("run")
    assert read_run(tmp_path) == []
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test.json").write_text('{"nodeid": 1, "sections": 5}')
    with pytest.raises(ArtifactsError, match=r"test\.json"):
        read_run(tmp_path)


def test_damaged_lines_of_a_timeline_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "timeline.jsonl").write_bytes(b'{"time": 1, "kind": "note"}\n[]\n{"time": "x"}\n\xff\n{"time": 2, "ki')
    found: list[dict[str, Any]] = list(TestArtifacts(folder=tmp_path, nodeid="x").events())

    assert found == [{"time": 1, "kind": "note"}]
