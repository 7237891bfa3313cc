"""Whole pytest runs with real machines: how they end, and what they say when something is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import ImageStore
from tests.conftest import is_gone

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog

Find = Callable[[Path], list[int]]

pytestmark = pytest.mark.usefixtures("inner")

SLEEPER = """
    import time, pytest

    @pytest.mark.vm("debian-12")
    def test_sleeps(vm):
        open({flag!r}, "w").write(str(vm.pid))
        time.sleep(600)
"""


def _gone(pid: int, seconds: float) -> bool:
    return bool(Deadline(seconds).poll(lambda: is_gone(pid), every=0.02))


def _started(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """A pytest that hears of Ctrl-C, even if this one was started as a shell starts what is to run in the background."""
    argv = ["env", "--default-signal=INT", sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.Popen(argv, cwd=folder, start_new_session=True)


@pytest.fixture
def sleeping(inner: pytest.Pytester, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A pytest run in the middle of a test, and the process of the machine it holds."""
    flag = tmp_path / "flag"
    inner.makepyfile(SLEEPER.format(flag=str(flag)))
    extra = getattr(request, "param", [])
    run = _started(inner.path, *extra)
    try:
        written = Deadline(300).poll(lambda: flag.read_text() if flag.exists() else None, every=0.1)
        assert written, "the test did not begin"
        yield run, int(written)
    finally:
        run.kill()
        run.wait()


def test_killing_pytest_in_the_middle_of_a_test_leaves_no_machine(
    sleeping: tuple[subprocess.Popen[bytes], int], vm_catalog: Catalog
) -> None:
    run, machine = sleeping
    folders = list((vm_catalog.root / "run").glob(f"{run.pid}-*"))
    run.kill()
    assert _gone(machine, 60)
    run.wait()
    assert len(folders) == 2, "a folder and its lock"
    assert Deadline(60).poll(lambda: not any(folder.exists() for folder in folders))


def test_ctrl_c_in_the_middle_of_a_test_leaves_nothing(sleeping: tuple[subprocess.Popen[bytes], int], vm_catalog: Catalog) -> None:
    run, machine = sleeping
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == pytest.ExitCode.INTERRUPTED
    assert _gone(machine, 1.0)
    assert list((vm_catalog.root / "run").glob(f"{run.pid}-*/*")) == []


def test_ctrl_c_while_a_machine_boots_leaves_nothing(inner: pytest.Pytester, vm_catalog: Catalog, machines_of: Find) -> None:
    inner.makepyfile('import pytest\n@pytest.mark.vm("debian-12", fresh="boot", name="interrupted")\ndef test_x(vm): pass\n')
    run = _started(inner.path)

    def mine() -> list[int]:
        return [pid for pid in machines_of(vm_catalog.root) if "interrupted" in Path(f"/proc/{pid}/cmdline").read_text()]

    assert Deadline(120).poll(mine, every=0.1), "no machine was started"
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == pytest.ExitCode.INTERRUPTED
    assert mine() == []
    assert list((vm_catalog.root / "run").glob(f"{run.pid}-*/*")) == []


@pytest.mark.guests
def test_a_machine_that_dies_in_a_test_is_told_at_once_with_its_cause(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        """
        import os, signal, time, pytest
        from pytest_vmbottle import MachineDied

        @pytest.mark.vm("debian-12")
        def test_killed(vm):
            vm.exec("true")
            os.kill(vm.pid, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(MachineDied, match="SIGKILL"):
                vm.exec("sleep 50")
            assert time.monotonic() - began < 10

        @pytest.mark.vm("debian-12", panic="expected")
        def test_panics(vm):
            began = time.monotonic()
            with pytest.raises(MachineDied, match="Kernel panic") as caught:
                vm.exec("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger", timeout=50)
            assert "sysrq triggered crash" in caught.value.console_tail
            assert time.monotonic() - began < 30

        @pytest.mark.vm("debian-12")
        def test_powers_off(vm):
            with pytest.raises(MachineDied, match="status 0"):
                vm.exec("systemctl poweroff; sleep 50", timeout=55)
        """
    )
    inner.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)


@pytest.mark.guests
def test_two_workers_make_a_pack_once_and_each_uses_it(inner: pytest.Pytester) -> None:
    inner.makepyfile(
        f"""
        import pytest
        from pytest_vmbottle import layer

        @layer("debian-12", version="{time.time_ns()}")
        def counted(vm):
            vm.path("/root/built").write_text("x")

        @pytest.mark.parametrize("number", range(4))
        @pytest.mark.vm(counted)
        def test_each(vm, number):
            assert vm.path("/root/built").read_text() == "x"
        """
    )
    result = inner.runpytest_subprocess("-p", "xdist", "-n2", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*vmbottle: 4 machines restored, 0 booted; 1 pack built, *"])
    assert result.stderr.str().count("vmbottle: building the template pack of counted") == 1


def test_a_layer_that_fails_is_told_in_full_once_and_not_kept(inner: pytest.Pytester, vm_catalog: Catalog) -> None:
    inner.makepyfile(
        """
        import pytest
        from pytest_vmbottle import layer

        @layer("debian-12")
        def broken_by_its_command(vm):
            vm.exec("printf 'the %s' reason >&2; exit 7")

        @pytest.mark.vm(broken_by_its_command)
        def test_one(vm): pass

        @pytest.mark.vm(broken_by_its_command)
        def test_two(vm): pass
        """
    )
    result = inner.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=2)
    output, _, summary = result.stdout.str().partition("short test summary info")  # which has it once more where CI is set
    assert output.count("the reason") == 1
    assert "test_a_layer_that_fails_is_told_in_full_once_and_not_kept.py::test_one" in output
    assert "Traceback" not in output + summary
    # Told by its name: other workers make packs meanwhile.
    assert "broken_by_its_command" not in {pack.manifest.name for pack in packs.scan(vm_catalog.packs)[0]}


# -- bad input: a sentence that says what and what to do, no traceback, nothing left -----------------------------------------------------


def _one_test(inner: pytest.Pytester, mark: str, *options: str) -> str:
    inner.makepyfile(f"import pytest\n@pytest.mark.vm({mark})\ndef test_x(vm): pass\n")
    result = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail", "--vm-infra-retries=0", *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    output = result.stdout.str() + result.stderr.str()
    assert "Traceback" not in output
    assert "pytest_vmbottle/" not in output
    return output


def test_an_unknown_image_is_told_with_the_commands_that_bring_one(inner: pytest.Pytester) -> None:
    output = _one_test(inner, '"debain-12"')
    assert "'debian-12'" in output
    assert "vmbottle image add" in output


@pytest.mark.guests
def test_an_image_file_that_is_missing_or_no_image_is_told(inner: pytest.Pytester, tmp_path: Path) -> None:
    assert "none.qcow2" in _one_test(inner, repr(str(tmp_path / "none.qcow2")))
    (tmp_path / "text.qcow2").write_text("hello\n" * 1000)
    assert "disk" in _one_test(inner, repr(str(tmp_path / "text.qcow2")))


@pytest.mark.guests
def test_more_memory_than_the_host_has_is_told(inner: pytest.Pytester) -> None:
    assert "memory=64 TiB" in _one_test(inner, '"debian-12", memory="64T"')


def test_a_missing_qemu_is_told_with_the_command_that_installs_it(inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(inner.path))
    output = _one_test(inner, '"debian-12"')
    assert "qemu-system-x86_64" in output
    assert "apt-get install qemu-system-x86" in output


@pytest.mark.guests
def test_a_qemu_that_dies_at_start_is_told_with_what_it_printed(
    inner: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo "QEMU emulator version 0.0"\necho "the library is broken" >&2; exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    assert "the library is broken" in _one_test(inner, '"debian-12"')


@pytest.fixture
def own_image(vm_catalog: Catalog, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """A function that adds the Debian image under another name and with another kernel command line."""
    store = ImageStore(vm_catalog.images)
    names = []

    def add(name: str, cmdline: str) -> None:
        debian = store.get("debian-12")
        assert debian is not None
        disk = tmp_path / f"{name}.raw"
        # Another content, because the store goes by it: a small file system's beginning is enough for a kernel that never mounts it.
        subprocess.run(
            ["mke2fs", "-q", "-L", name, disk, "4M"], check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        )
        store.add(disk, name=name, kernel=debian.kernel, initrd=debian.initrd, cmdline=cmdline)
        names.append(name)

    yield add
    for name in names:
        store.remove(name)


@pytest.mark.guests
def test_a_guest_that_panics_is_told_at_once_with_its_console(
    inner: pytest.Pytester, own_image: Callable[[str, str], None], machines_of: Find, vm_catalog: Catalog
) -> None:
    own_image("panics", "root=/dev/vda rw console=ttyS0 quiet rdinit=/bin/false")
    began = time.monotonic()
    output = _one_test(inner, '"panics", timeout=1000, name="panicking"')
    assert "Kernel panic - not syncing" in output
    assert "-nodefaults" not in output, "QEMU's command line says nothing of a guest's panic"
    assert time.monotonic() - began < 300
    assert not [pid for pid in machines_of(vm_catalog.root) if "panicking" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.guests
def test_a_guest_that_never_comes_up_is_told_at_its_deadline_with_its_console(
    inner: pytest.Pytester, own_image: Callable[[str, str], None]
) -> None:
    own_image("hangs", "root=/dev/vda rw console=ttyS0 rdinit=/bin/cat")
    output = _one_test(inner, '"hangs", timeout=1')
    assert "SSH" in output
    assert "console" in output


def test_a_qemu_that_does_not_start_is_told_with_what_it_said_last(inner: pytest.Pytester) -> None:
    inner.makeconftest("import resource\nresource.setrlimit(resource.RLIMIT_AS, (5 << 29, resource.RLIM_INFINITY))")
    output = _one_test(inner, '"debian-12", memory="3G"')
    assert "LaunchError: " in output
    assert "Cannot allocate memory" in output
    assert "-nodefaults" in output
    assert "vmbottle: INFRA: 1 test" in output


def test_a_processor_that_qemu_does_not_know_is_the_tests_own_mistake(inner: pytest.Pytester) -> None:
    output = _one_test(inner, '"debian-12", cpu="Transistor"')
    assert "unable to find CPU model 'Transistor'" in output
    assert "INFRA" not in output


def test_a_catalog_that_cannot_be_used_is_told(inner: pytest.Pytester, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = _one_test(inner, '"debian-12"', f"--vm-catalog={tmp_path / 'file'}")
    assert "--vm-catalog" in output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, mounted in a namespace of the test run's own where that needs no more than this user has."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "small", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.guests
def test_a_catalog_on_a_full_disk_is_told_and_nothing_half_made_is_left(
    inner: pytest.Pytester, small_disk: Path, vm_catalog: Catalog
) -> None:
    catalog = small_disk / "catalog"
    catalog.mkdir(mode=0o700)
    (catalog / "images").symlink_to(vm_catalog.images)
    output = _one_test(inner, '"debian-12"', f"--vm-catalog={catalog}", "--vm-pack=template")
    assert "is full" in output
    assert "vmbottle pack prune" in output
    assert not list((catalog / "packs").glob("*"))
    assert not list((catalog / "run").glob("*/*"))
    shutil.rmtree(catalog / "run", ignore_errors=True)
