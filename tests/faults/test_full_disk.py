"""A guest writes to its disk, and the host has no room for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MOUNTS = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
# A boot sector that writes itself to one place of its disk after the other, 64 KiB apart, by the BIOS's int 13h, AH=43h.
SECTOR = bytes.fromhex(
    "31c0 8ed8"  # xor ax,ax; mov ds,ax
    "be 187c"  # mov si,0x7c18: the packet
    "b8 0043 b280"  # write: mov ax,0x4300; mov dl,0x80
    "cd13"  # int 0x13
    "8106 207c 8000"  # add word [0x7c20],128: the next place
    "ebf1 9090"  # jmp write
    "1000 0100 007c 0000 8000000000000000"  # 16 bytes, one sector, from 0:0x7c00, to sector 128
)
MACHINE = """
import subprocess, sys, time
from pathlib import Path
from pytest_vmbottle import MachineDied, MachineSpec
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.backends.port import Disk, Start
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.channels.ssh import new_keys
from pytest_vmbottle.provision.seed import write_seed

folder = Path(sys.argv[1])
small = folder / "small"
small.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(small)], check=True)
keys = new_keys()
write_seed(folder / "seed.iso", hostname="vm", keys=keys, user_data=None)
disks = (Disk(path=folder / "disk.raw", format="raw"),)
source = Start(disks=disks, disk_size=64 << 20, kernel=None, initrd=None, cmdline="", seed=folder / "seed.iso", keys=keys)
backend = QemuBackend(accelerator="tcg", proofs=folder / "proofs")
spec = MachineSpec(source="disk", memory=64 << 20, arch="x86_64")
instance = backend.launch(spec, source=source, rundir=small, deadline=Deadline(120))
try:
    def trouble():
        try:
            instance.alive()
        except MachineDied as error:
            return str(error)
    print(Deadline(60).poll(trouble))
finally:
    instance.stop()
"""


@pytest.mark.skipif(
    subprocess.run([*MOUNTS, "true"], capture_output=True, check=False).returncode != 0,
    reason="a disk that is full takes a mount of one's own, which this host does not give",
)
def test_a_guest_whose_disk_finds_no_room_on_the_host_is_said_to_be_stopped_by_that(root: Path) -> None:
    root.mkdir()
    (root / "disk.raw").write_bytes(SECTOR.ljust(510, b"\0") + b"\x55\xaa" + bytes(64 << 20)[512:])
    argv = [*MOUNTS, sys.executable, "-c", MACHINE, str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the guest was stopped because its disk could not be written: is the catalog's file system full?")
