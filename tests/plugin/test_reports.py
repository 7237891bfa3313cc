"""What a run says: a line about the host, a line about its machines, and errors in words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., pytest.RunResult]


def said(result: pytest.RunResult) -> str:
    return result.stdout.str() + "\n" + result.stderr.str()


def test_a_run_says_what_machines_run_on_and_what_became_of_them(run: Run, catalog: Path) -> None:
    text = '@pytest.mark.vm("debian-12")\n@pytest.mark.parametrize("n", range(3))\ndef test_it(vm, n): pass\n'
    first = said(run(text, passed=3))
    second = said(run(text, "-p", "no:cacheprovider", passed=3))

    for text in (first, second):
        assert re.search(rf"^vmbottle: fake .*{catalog}", text, re.MULTILINE)
    assert re.search(r"^vmbottle: 3 machines .*1 booted.* 1 packs? .*0 reused.* \d+\.\d s ", first, re.MULTILINE)
    assert re.search(r"^vmbottle: 3 machines .*0 booted.* 0 packs? .*1 reused", second, re.MULTILINE)
    assert "template pack of debian-12" in first
    assert "building" not in second


def test_a_machine_that_cannot_be_provided_is_an_error_in_words_once_in_full(run: Run) -> None:
    result = said(
        run(
            """
@layer("debian-12")
def web(vm):
    raise RuntimeError("the shelf is empty")

pytestmark = pytest.mark.vm(web)

def test_one(vm): pass
def test_two(vm): pass
""",
            status=1,
            errors=2,
        )
    )

    assert "RuntimeError: the shelf is empty" in result
    assert "\nvm started" in result
    assert "test_it.py::test_one)" in result
    assert result.count("the console's last lines") == 1
    assert "provisioner.py" not in result
    assert "fixtures.py" not in result


def test_an_image_that_is_not_there_is_told_with_the_commands_that_bring_it(run: Run) -> None:
    result = said(run('@pytest.mark.vm("my-image")\ndef test_it(vm): pass\n', status=1, errors=1))

    assert "ImageMissing: " in result
    assert "vmbottle image add FILE --name my-image" in result
    assert ".py:" not in result.replace("test_it.py", "")


def test_more_memory_than_the_host_has_is_told_in_words(run: Run) -> None:
    result = said(run('@pytest.mark.vm("debian-12", memory="900T")\ndef test_it(vm): pass\n', status=1, errors=1))

    assert "memory=900 TiB" in result
    assert "provisioner.py" not in result


def test_a_full_traceback_shows_where_it_came_from_when_it_is_asked_for(run: Run) -> None:
    result = said(run('@pytest.mark.vm("my-image")\ndef test_it(vm): pass\n', "--full-trace", status=1, errors=1))

    assert "provisioner.py" in result


def test_a_failing_command_shows_its_output_and_no_frame_of_ours(run: Run) -> None:
    result = said(
        run(
            '@pytest.mark.vm("debian-12")\ndef test_it(vm):\n    vm.exec("rm -rf /x")\n',
            conftest="""
from pytest_vmbottle.channels.port import Finished

@pytest.hookimpl(tryfirst=True)
def pytest_vmbottle_make_backend(config, name):
    return FakeBackend(lambda command: Finished(returncode=5 if "rm" in command.argv[-1] else 0, stderr=b"\\x1b[31mbusy\\n::error::x"))
""",
            status=1,
            failed=1,
        )
    )

    assert "$ sh -eu -c 'rm -rf /x'" in result
    assert "status 5" in result
    assert "\\x1b[31mbusy" in result
    assert "machine.py" not in result
    assert not re.search(r"^::error", result, re.MULTILINE)


def test_the_mark_and_the_fixtures_are_listed_with_what_they_are(pytester: pytest.Pytester) -> None:
    marks = said(pytester.runpytest_inprocess("--markers"))
    fixtures = said(pytester.runpytest_inprocess("--fixtures"))

    assert "@pytest.mark.vm(source, *, name='vm'" in marks
    for name in ("vm", "vms", "vm_factory", "vm_spec", "vm_defaults", "vm_catalog", "class_vm", "module_vm", "session_vm"):
        assert re.search(rf"^{name}( \[(session|module|class) scope\])? -- .*plugin/fixtures\.py:\d+\n    \S", fixtures, re.MULTILINE), name


_PANICS = """
def panics(vm):
    vm.lifecycle.instance._note("[   12.345678] Kernel panic - not syncing: out of \\x1b[31mideas")

pytestmark = pytest.mark.vm("debian-12")

def test_that_does_not_look(vm): panics(vm)

def test_that_goes_on(vm):
    panics(vm)
    vm.exec("true")

@pytest.mark.vm(panic="expected")
def test_that_wants_it(vm):
    panics(vm)
    assert "out of" in vm.panic

def test_another(vm): vm.exec("true")

class TestShared:
    def test_first(self, class_vm): panics(class_vm)
    def test_second(self, class_vm): pass
"""


def test_a_test_that_passes_although_its_machines_kernel_panicked_is_failed_with_the_console(run: Run) -> None:
    result = said(run(_PANICS, status=1, failed=3, passed=3))

    why = "The test passed, but the kernel of its machine 'vm' was in trouble: Kernel panic - not syncing: out of \\x1b[31mideas"
    assert result.count(why) == 2  # the second test of the class is not blamed for the first
    assert 'panic="expected"' in result
    assert result.count("console of vm") == 2
    assert "GuestPanic: " in result
    assert "\x1b[31mideas" not in result


HOSTILE = "\x1b[2J\n::error::of the guest\n  ::add-mask::x\n##vso[task.complete]\n##teamcity[x]\n--- x\n+++ y\nsection_start:1:x"
COMMAND = re.compile(r"^\s*::|##(\[|vso\[|teamcity\[)|section_start:|^(\+\+\+|~~~|\^\^\^) |^--- [a-z]|\x1b\[2J", re.MULTILINE)


def test_nothing_that_a_guest_says_is_a_command_to_a_terminal_or_a_ci_service_in_any_report(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    text = f"""
from pytest_vmbottle import CommandFailed, MachineError, Result

TEXT = bytes.fromhex("{HOSTILE.encode().hex()}").decode()
pytestmark = pytest.mark.vm("debian-12")

@pytest.mark.parametrize("error", [
    RuntimeError(TEXT),
    FileNotFoundError(2, "none", TEXT),
    MachineError(TEXT, console_tail=TEXT, argv=[TEXT]),
    CommandFailed(Result(argv=(TEXT,), returncode=1, stdout=TEXT, stderr=TEXT)),
], ids=range(4))
def test_raised(module_vm, error): raise error

def test_compared(module_vm): assert TEXT == TEXT + "x"

def test_printed(module_vm):
    said = TEXT
    print(TEXT)
    assert said is None
"""
    result = said(run(text, "-vv", "-l", "--color=yes", "--junitxml", str(file), status=1, failed=6))

    assert COMMAND.search(HOSTILE)
    assert "of the guest" in result
    assert not COMMAND.search(result)
    assert not COMMAND.search(file.read_text())
