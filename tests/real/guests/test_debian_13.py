"""The newest release of Debian, as an image that a project declares: built, booted, packed and restored."""

from __future__ import annotations

import time
from pathlib import Path

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.channels.ssh import SshChannel
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import declared_images
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.spec.pack_kind import PackKind

DECLARED = """
[tool.vmbottle.images.small]
build = "debian-13"
packages = ["tree"]
script = "setup.sh"
"""
SCRIPT = """\
#!/bin/bash -eu
[[ $(id -u) == 0 && $PWD == / ]]
useradd --create-home web
echo "It's $(getent passwd web | cut -d: -f6)" > /etc/made-by-script
"""


def test_a_declared_image_of_debian_13_is_built_booted_packed_and_poured(vm_catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(DECLARED)
    (tmp_path / "setup.sh").write_text(SCRIPT)
    settings = Settings(declared=declared_images(tmp_path), timeout_factor=2)
    provisioner = Provisioner(Catalog(tmp_path / "catalog"), QemuBackend(proofs=vm_catalog.proofs), name="qemu", settings=settings)
    spec = MachineSpec.resolve("small", {})
    try:
        random = {_looked_over(provisioner, spec) for _ in range(2)}
        kind = provisioner.pack(spec).manifest.kind
    finally:
        provisioner.close()
    assert len(random) == 2
    assert kind == provisioner.capabilities.pack_kind
    expected = (1, 2) if kind == PackKind.TEMPLATE else (3, 0)
    assert (provisioner.tally.booted, provisioner.tally.restored) == expected


def _looked_over(provisioner: Provisioner, spec: MachineSpec) -> str:
    """Looks at a machine from all sides; some of its random bytes."""
    began = time.time()
    with provisioner.machine(spec) as vm:
        assert 'VERSION_ID="13"' in vm.path("/etc/os-release").read_text().splitlines()
        assert vm.exec(["systemctl", "is-system-running"], check=False).stdout == "running\n"
        assert vm.exec(["cloud-init", "status"]).stdout == "status: disabled\n"
        assert vm.exec(["hostname"]).stdout == "vm\n"
        assert vm.path("/etc/made-by-script").read_text() == "It's /home/web\n"
        assert vm.exec(["tree", "--noreport", "-i", "/home"]).stdout.splitlines()[-1].endswith("web")
        assert vm.path("/etc/resolv.conf").read_text() == "nameserver 10.0.2.3\n"
        assert not [path for path in vm.path("/").iterdir() if path.name.startswith("vmbottle")]
        assert float(vm.exec("date +%s.%N").stdout) >= began
        assert isinstance(vm.lifecycle.instance.channel(deadline=Deadline(120), bulk=True), SshChannel)
        return vm.exec("head -c 16 /dev/urandom | od -An -tx1").stdout
