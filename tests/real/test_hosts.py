"""Other hosts than this one: what the same code does where the QEMU, the rights or the room are others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.packs import scan
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.provision import Provisioner, Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_vmbottle.catalog.catalog import Catalog


@pytest.fixture
def provisioner(vm_catalog: Catalog) -> Iterator[Provisioner]:
    made = Provisioner(vm_catalog, QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=Settings())
    yield made
    made.close()


def test_machines_are_poured_from_packs_of_this_very_qemu(provisioner: Provisioner, vm_catalog: Catalog) -> None:
    """A catalog may hold what other QEMUs have left there: in Debian 13's root it does (see .ci/debian13)."""
    spec = MachineSpec.resolve("debian-12", {})
    chosen = provisioner.pack(spec)
    able = provisioner.capabilities
    with provisioner.machine(spec) as machine:
        assert machine.exec(["echo", "poured"]).stdout == "poured\n"
    assert provisioner.tally.booted in (0, 1)  # 1 if the pack was not there yet
    assert provisioner.tally.restored == 1

    others = [pack for pack in scan(vm_catalog.packs)[0] if pack.manifest.backend != f"qemu {able.version} {able.accelerator}"]
    assert chosen.manifest.backend == f"qemu {able.version} {able.accelerator}"
    assert chosen.key not in {pack.key for pack in others}


# -- another user than root -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def of_nobody(vm_catalog: Catalog) -> Iterator[Provisioner]:
    """Machines whose QEMU runs as a user who owns nothing, and has nothing in the end."""
    backend = QemuBackend(account=Account.parse("nobody"), proofs=vm_catalog.proofs)
    with closing(Provisioner(vm_catalog, backend, name="qemu", settings=Settings())) as provisioner:
        yield provisioner
    assert not _of_others(vm_catalog.root), "something in the catalog has changed hands"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as somebody else")
def test_where_root_runs_the_tests_qemu_can_be_somebody_who_owns_nothing(of_nobody: Provisioner) -> None:
    account = Account.parse("nobody")
    with of_nobody.machine(MachineSpec.resolve("debian-12", {})) as machine:
        status = Path(f"/proc/{machine.pid}/status").read_text()
        assert f"Uid:\t{account.uid}\t{account.uid}\t{account.uid}\t{account.uid}\n" in status
        assert f"Gid:\t{account.gid}\t{account.gid}\t{account.gid}\t{account.gid}\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        assert machine.exec(["id", "-un"]).stdout == "root\n"


@pytest.mark.guests
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as somebody else")
def test_a_qemu_that_owns_nothing_has_disks_copies_and_snapshots(of_nobody: Provisioner, tmp_path: Path) -> None:
    (tmp_path / "much").write_bytes(os.urandom(3 << 20))
    with of_nobody.machine(MachineSpec.resolve("debian-12", {"disks": {"data": "16M"}, "track_writes": True})) as machine:
        assert machine.exec("blockdev --getsize64 /dev/disk/by-id/virtio-data").stdout == f"{16 << 20}\n"
        machine.cp(tmp_path / "much", machine.path("/root/much"))
        assert machine.path("/root/much").hash("sha256") == hashlib.sha256((tmp_path / "much").read_bytes()).hexdigest()
        before = machine.snapshot("before")
        machine.exec("rm /root/much")
        machine.restore(before)
        assert machine.path("/root/much").exists()
        machine.restore()
        assert not machine.path("/root/much").exists()
    assert of_nobody.tally.restored >= 2


@pytest.mark.guests
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run programs as somebody else")
def test_a_qemu_that_owns_nothing_makes_screenshots(of_nobody: Provisioner, tmp_path: Path) -> None:
    with of_nobody.machine(MachineSpec.resolve("debian-12", {"display": True})) as machine:
        assert machine.screenshot(tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")


def _of_others(root: Path) -> list[Path]:
    """Files of others than root in a folder in which workers come and go."""
    found = []
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            with suppress(FileNotFoundError):
                if path.lstat().st_uid != 0:
                    found.append(path)
    return found


# -- a container -----------------------------------------------------------------------------------------------------------------------

LIMIT, MEMORY = 900 << 20, 768 << 20
OUTSIDE = ("HOME", "VMBOTTLE_CATALOG", "XDG_", "PYTEST_")
IN_A_CONTAINER = """
    import ctypes, os, pytest
    from pathlib import Path

    def test_this_is_a_container():
        libc = ctypes.CDLL(None, use_errno=True)
        assert (libc.syscall(425, 1, 0), ctypes.get_errno()) == (-1, 1), "io_uring is there"
        assert not Path("/dev/kvm").exists()
        shm = os.statvfs("/dev/shm")
        assert shm.f_blocks * shm.f_frsize == 64 << 20
        with pytest.raises(OSError):
            (Path.home() / "x").touch()

    @pytest.mark.vm("debian-12", memory={memory})
    @pytest.mark.parametrize("number", range(2))
    def test_a_clone_touches_much_of_its_memory(vm, number):
        assert vm.exec(["python3", "-c", "print(sum(bytearray(b'x' * (200 << 20))[::4096]) > 0)"]).stdout == "True\\n"
"""
TOO_LARGE = """
    @pytest.mark.vm("debian-12", memory={limit})
    def test_more_than_the_limit(vm): pass
"""


@attrs.frozen(kw_only=True)
class Container:
    """A place with a read-only home, a /dev of its own with 64 MiB of shared memory, no io_uring, and perhaps little memory.

    Attributes:
        home: What is read-only in it.
        var: What it has as /var/tmp.
        shown: What it must see even if it lies in the /var/tmp outside.
        group: A control group that limits its memory.
    """

    home: Path
    var: Path
    shown: tuple[Path, ...]
    group: Path | None

    def run(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs a program in it to its end."""
        join = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self.group)] if self.group else []
        own = {"HOME": str(self.home)} | {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
        with tempfile.TemporaryFile() as rules:
            rules.write(_without_io_uring())
            rules.seek(0)
            command = [*join, "bwrap", *self._view(), "--seccomp", str(rules.fileno()), "--", *map(str, argv)]
            return subprocess.run(command, env=own, pass_fds=[rules.fileno()], capture_output=True, text=True, timeout=500, check=False)

    def _view(self) -> list[str]:
        again = [word for path in self.shown for word in ("--bind", str(path), str(path))]
        files = ["--bind", "/", "/", "--bind", str(self.var), "/var/tmp", *again, "--ro-bind", str(self.home), str(self.home)]
        devices = ["--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/dev/shm", "--proc", "/proc"]
        return ["--unshare-pid", "--die-with-parent", *files, *devices]


def _without_io_uring() -> bytes:
    """A filter of system calls, see seccomp(2): the three of io_uring, 425 to 427, fail with EPERM, as in Docker."""
    load, at_least, above, result = 0x20, 0x35, 0x25, 0x06
    program = [(load, 0, 0, 0), (at_least, 0, 2, 425), (above, 1, 0, 427), (result, 0, 0, 0x50001), (result, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _new_group() -> Path | None:
    """A control group with little memory, of either version, below this process's own or the topmost; None where it cannot be had."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    tops = (
        (Path("/sys/fs/cgroup/memory"), own.get("memory", "/"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), own.get("", "/"), "memory.max"),
    )
    for top, path, limit in tops:
        for parent in (top / path.lstrip("/"), top):
            group = parent / f"vmbottle-test-{os.getpid()}"
            with suppress(OSError):
                group.mkdir()
                if (group / limit).exists():
                    (group / limit).write_text(str(LIMIT))
                    return group
                group.rmdir()
    return None


@pytest.fixture
def container(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, vm_catalog: Catalog, provisioner: Provisioner
) -> Iterator[Container]:
    assert shutil.which("bwrap"), "this test needs bwrap: sudo apt-get install bubblewrap"
    provisioner.pack(MachineSpec.resolve("debian-12", {}))  # so that there is an image
    for name in ("home", "var"):
        (tmp_path / name).mkdir()
    catalog = tmp_path / "var" / f"pytest-vmbottle-{os.geteuid()}"
    catalog.mkdir(mode=0o700)
    (catalog / "images").symlink_to(vm_catalog.images)
    group = _new_group()
    shown = (tmp_path_factory.getbasetemp(), Path(sys.prefix), vm_catalog.root, pytestconfig.rootpath)
    yield Container(home=tmp_path / "home", var=tmp_path / "var", shown=shown, group=group)
    if group is not None:

        def removed() -> bool:
            with suppress(OSError):
                group.rmdir()
            return not group.exists()

        assert Deadline(10).poll(removed), "something still runs in the container"


@pytest.mark.guests
def test_in_a_container_machines_run_and_the_doctor_says_what_is_degraded(container: Container, pytester: pytest.Pytester) -> None:
    doctor = container.run(sys.executable, "-c", "from pytest_vmbottle.cli import main; main()", "doctor", "--json")
    found: dict[str, Any] = {finding["topic"]: finding for finding in json.loads(doctor.stdout)}
    assert doctor.returncode == 0, doctor.stderr
    assert found["accelerator"]["state"] == "degraded"
    assert found["accelerator"]["text"].startswith("/dev/kvm cannot be opened: No such file or directory: using TCG")
    assert found["catalog"]["state"] == "degraded"
    assert found["catalog"]["details"]["path"] == f"/var/tmp/pytest-vmbottle-{os.geteuid()}"
    assert found["packs"]["details"]["kind"] == "template"
    assert "unknown" not in {finding["state"] for finding in found.values()}

    limited = container.group is not None
    path = pytester.makepyfile(IN_A_CONTAINER.format(memory=MEMORY) + (TOO_LARGE.format(limit=LIMIT) if limited else ""))
    run = container.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--vm-missing=fail", "-v", path)
    assert run.stdout.count(" PASSED ") == 3, run.stdout + run.stderr
    assert f"catalog /var/tmp/pytest-vmbottle-{os.geteuid()} ({container.home}/.cache" in run.stdout
    assert "2 machines restored, 1 booted; 1 pack built" in run.stdout
    if not limited:
        pytest.skip("all but the limit of memory was seen to work: no control group can be made here")
    assert "900 MiB" in found["memory"]["text"]
    assert "900 MiB" in run.stdout
    assert "1 error" in run.stdout
