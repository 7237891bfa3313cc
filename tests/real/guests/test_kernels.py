"""Kernels and command lines that a mark gives, in place of an image's own."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from pytest_vmbottle import GuestPanic, Machine, MachineFactory, SpecError
from pytest_vmbottle.backends.qemu.command_line import FIXED_ADDRESSES
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.images import Image, ImageStore


@pytest.fixture
def image(vm_catalog: Catalog, vm_factory: MachineFactory) -> Image:
    """The image `debian-12`, which has a kernel beside its disk."""
    vm_factory("debian-12")  # it is there afterwards
    found = ImageStore(vm_catalog.images).get("debian-12")
    assert found is not None
    assert found.kernel is not None
    assert found.initrd is not None
    return found


def booted_with(vm: Machine) -> str:
    """The kernel's command line, without the word that an emulated processor gets before it."""
    return vm.path("/proc/cmdline").read_text().removeprefix(f"{FIXED_ADDRESSES} ")


@pytest.mark.vm("debian-12", append="quiet foo=1")
def test_words_are_added_to_the_command_line_of_a_clone_and_are_there_after_a_reboot(vm: Machine, image: Image) -> None:
    line = booted_with(vm)
    assert line == f"{image.cmdline} quiet foo=1\n"
    vm.reboot()
    assert booted_with(vm) == line


def test_a_kernel_of_ones_own_is_booted_with_its_initial_ram_disk_and_command_line(
    vm_factory: MachineFactory, image: Image, tmp_path: Path
) -> None:
    kernel, initrd = tmp_path / "bzImage", tmp_path / "initrd"
    shutil.copyfile(str(image.kernel), kernel)
    shutil.copyfile(str(image.initrd), initrd)
    words = image.cmdline.replace(" quiet", "")
    vm = vm_factory("debian-12", kernel=kernel, initrd=initrd, cmdline=words, append="foo=2")
    assert booted_with(vm) == f"{words} foo=2\n"

    # They may be built again: the pack has its own.
    kernel.write_bytes(b"half of a kernel")
    initrd.unlink()
    vm.reboot()
    assert vm.exec(["grep", "-c", "foo=2", "/proc/cmdline"]).stdout == "1\n"
    assert "Linux version" in vm.console.text, "it was not quiet"


def test_the_initial_ram_disk_of_the_image_is_not_taken_for_another_kernel(vm_factory: MachineFactory, image: Image) -> None:
    # Debian's kernel has the driver of its disk as a module in there.
    with pytest.raises(GuestPanic, match="Unable to mount root fs"):
        vm_factory("debian-12", kernel=image.kernel, fresh="boot")


def test_what_an_image_with_a_boot_loader_lacks_for_a_direct_boot_is_said(vm_factory: MachineFactory, image: Image, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    shutil.copyfile(image.disk, disk)
    with pytest.raises(SpecError, match=r"append=: the image .* is booted by its firmware, .*: give kernel= and cmdline= too"):
        vm_factory(disk, append="foo=3", fresh="boot")
    with pytest.raises(SpecError, match=r"kernel=: the image .* has no command line for it: give cmdline= too"):
        vm_factory(disk, kernel=image.kernel, fresh="boot")
    vm = vm_factory(disk, kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline, append="foo=3", fresh="boot")
    assert booted_with(vm) == f"{image.cmdline} foo=3\n"


def packet(text: str) -> bytes:
    """A packet of the protocol that gdb speaks."""
    return f"${text}#{sum(text.encode()) % 256:02x}".encode()


def answer(gdb: socket.socket) -> str:
    """The stub's next message."""
    data = b""
    while not re.fullmatch(rb"[^$]*\$[^#]*#..", data, re.DOTALL):
        data += gdb.recv(1)
    gdb.sendall(b"+")
    return data.decode().partition("$")[2].rpartition("#")[0]


def asked(gdb: socket.socket, text: str) -> str:
    """The answer of the stub, which also says unasked that the guest has stopped."""
    gdb.sendall(packet(text))
    return next(said for said in iter(lambda: answer(gdb), "") if text == "?" or not said.startswith("T"))


@pytest.mark.vm("debian-12")
def test_a_debugger_stops_the_guest_looks_into_it_and_lets_it_go_on(vm: Machine) -> None:
    vm.exec("systemd-run sh -c 'while :; do date +%s.%N > /run/beat; sleep 0.1; done'")
    vm.wait_for_file("/run/beat")
    path = vm.gdb()
    assert path.stat().st_mode & 0o077 == 0
    assert vm.gdb() == path
    with socket.socket(socket.AF_UNIX) as gdb:
        gdb.settimeout(30)
        gdb.connect(str(path))
        assert asked(gdb, "?").startswith("T")
        assert len(asked(gdb, "g")) > 16 * 16, "registers"
        assert vm.qmp("query-status")["running"] is False
        assert asked(gdb, "D") == "OK"  # it leaves
    vm.wait_until(lambda: vm.qmp("query-status")["running"])
    assert vm.exec(["true"]).ok
