"""Faults that act inside a guest, in machines of the real smolvm, and those that it has not.

smolvm's Alpine has no Python, which faults take: it gets that of this host, with the few modules that are needed.
"""

from __future__ import annotations

import datetime as dt
import io
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineError, Unsupported
from pytest_vmbottle.host.package_data import read_script

pytestmark = pytest.mark.vm("smolvm", backend="smolvm", memory="256M", timeout=300)

_PROGRAMS = "\n".join(read_script("pytest_vmbottle.machine", name) for name in ("hold.py", "faults.py", "clock_faults.py"))
_LOADED = """
import sys
lines = [line.strip() for line in sys.stdin.read().splitlines()]
exec("\\n".join(line for line in lines if line.startswith(("import ", "from ")) and "__future__" not in line))
import __future__, codecs, encodings.ascii, encodings.idna, encodings.latin_1, encodings.utf_8
print(*{module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)}, sep="\\n")
"""
"""Tells which files Python reads to have the modules that the scripts on its input import."""


def _python() -> bytes:
    """An archive with the Python of this host and its modules for faults, at the places that they have here."""
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    loaded = subprocess.run([python, "-I", "-S", "-c", _LOADED], input=_PROGRAMS, capture_output=True, text=True, check=True)
    modules = {Path(line) for line in loaded.stdout.splitlines()}
    programs = {python, *(path for path in modules if path.suffix == ".so")}
    linked = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    libraries = {Path(path) for path in re.findall(r"(/\S+) \(0x", linked)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", dereference=True) as archive:
        for path in sorted({python, *modules, *libraries}):
            archive.add(path, path.relative_to("/"))
        link = tarfile.TarInfo("usr/local/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, str(python)
        archive.addfile(link)
    return packed.getvalue()


@pytest.fixture(scope="module")
def guest(module_vm: Machine) -> Machine:
    """A machine with Python."""
    module_vm.exec("cat > /root/python.tar.gz; tar -xzf /root/python.tar.gz -C /; rm /root/python.tar.gz", input=_python(), timeout=300)
    return module_vm


@pytest.fixture
def small(guest: Machine) -> Iterator[str]:
    """A file system of 8 MiB with 64 inodes, in a folder of the guest."""
    guest.exec("mkdir -p /root/small && mount -t tmpfs -o size=8M,nr_inodes=64 none /root/small")
    yield "/root/small"
    guest.exec("umount /root/small")


def off(vm: Machine) -> float:
    """Seconds by which the guest's wall clock is ahead of ours."""
    return float(vm.exec(["date", "+%s"]).stdout) - time.time()


def test_a_guest_without_python_is_told_of(vm: Machine) -> None:
    with pytest.raises(MachineError, match="it has no Python 3"):
        vm.faults.disk_full("/root").start()


def test_a_file_system_is_full_of_data_or_of_files(guest: Machine, small: str) -> None:
    with guest.faults.disk_full(small):
        assert "No space left" in guest.exec(f"echo more > {small}/file", check=False).stderr
    assert guest.exec(f"echo more > {small}/file; cat {small}/file").stdout == "more\n"
    with guest.faults.disk_full("/root", leave="2M"):
        assert "No space left" in guest.exec("dd if=/dev/zero of=/root/file bs=64k count=400", check=False).stderr
        guest.exec("rm /root/file; sync; dd if=/dev/zero of=/root/file bs=64k count=16")
    with guest.faults.inodes_full(small):
        assert "No space left" in guest.exec(f"touch {small}/another", check=False).stderr
    guest.exec(f"head -c 4000000 /dev/zero > /root/file; rm /root/file; touch {small}/another")


def test_time_goes_forward_and_back_and_is_right_again(guest: Machine) -> None:
    before = off(guest)
    for jump in (86400, -86400):
        with guest.faults.clock(jump=jump):
            assert abs(off(guest) - before - jump) < 5
        assert abs(off(guest) - before) < 5
    with guest.clock.set(dt.datetime(2038, 1, 19, tzinfo=dt.UTC)):
        assert guest.exec(["date", "-u", "+%F"]).stdout == "2038-01-19\n"
    with guest.faults.clock(rate=1.1):
        began, wall = time.monotonic(), off(guest)
        time.sleep(20)
        assert 0.05 * (time.monotonic() - began) < off(guest) - wall + 1, "a tenth more, to a second"
    assert abs(off(guest) - before) < 5


def test_memory_and_processors_are_short(guest: Machine) -> None:
    def free() -> int:
        return int(guest.exec("awk '/MemAvailable/ {print $2}' /proc/meminfo").stdout) << 10

    before = free()
    with guest.faults.memory_pressure(leave="64M"):
        assert free() < 80 << 20
    assert free() > before - (20 << 20)
    loop = ["python3", "-c", "for number in range(1000000): pass"]
    usual = min(guest.exec(loop).duration for _ in range(2))
    for fault in (guest.faults.cpu_throttle(20), guest.faults.cpu_steal(80)):
        with fault:
            assert guest.exec(loop).duration > 1.5 * usual


def test_the_machine_stands_still(guest: Machine) -> None:
    began = time.monotonic()
    with guest.faults.freeze(2):
        assert time.monotonic() - began > 2
        assert guest.exec(["echo", "on"]).stdout == "on\n"


def test_processes_stop_go_on_and_end(guest: Machine) -> None:
    def begun() -> int:
        return int(guest.exec("sleep 4711 >/dev/null 2>&1 & echo $!").stdout)

    def state(pid: int) -> str:
        return guest.exec(f"cut -d' ' -f3 /proc/{pid}/stat", check=False).stdout.strip()

    pid = begun()
    with guest.faults.process(pid).pause():
        assert state(pid) == "T"
    assert state(pid) == "S"
    guest.faults.process(pid).kill("TERM")
    guest.wait_until(lambda: state(pid) in ("", "Z"))


@pytest.mark.parametrize(
    "begin",
    [
        lambda vm: vm.faults.disk_errors("root", on="write").start(),
        lambda vm: vm.faults.slow_disk("root", iops=10).start(),
        lambda vm: vm.faults.lying_disk("root").start(),
        lambda vm: vm.power_cut(lose="unflushed"),
        lambda vm: vm.plug_disk("data", "64M"),
    ],
    ids=["disk_errors", "slow_disk", "lying_disk", "power_cut", "plug_disk"],
)
def test_what_smolvm_has_not_is_refused_and_the_machine_goes_on(guest: Machine, begin: Callable[[Machine], object]) -> None:
    with pytest.raises(Unsupported, match="smolvm"):
        begin(guest)
    assert guest.exec(["echo", "on"]).stdout == "on\n"


def test_what_a_guest_has_not_is_told_and_the_machine_goes_on(guest: Machine) -> None:
    with pytest.raises(MachineError, match="systemctl"):
        guest.faults.process("crond").pause().start()
    with pytest.raises(MachineError, match="SysRq"):
        guest.faults.process(1).oom()
    with pytest.raises(MachineError, match="strace"):
        guest.faults.syscall(1, "fsync").start()
    with pytest.raises(MachineError, match="not on a private LAN"):
        guest.faults.network(loss=0.5)
    assert guest.exec(["echo", "on"]).stdout == "on\n"
