"""Causes of failures on real guests, found in the report of the run alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from pytest_vmbottle.catalog.catalog import Catalog

pytestmark = pytest.mark.guests

TESTS = r"""
import pytest
import urllib.request

SERVICE = "[Service]\nExecStart={}\n"


def unit(vm, name, command, more=""):
    vm.path(f"/etc/systemd/system/{name}.service").write_text(SERVICE.format(command) + more)
    vm.exec(["systemctl", "start", name], check=False)


@pytest.mark.vm("debian-12")
def test_import(vm):
    unit(vm, "shop", "/usr/bin/python3 -c 'import flask'")
    vm.wait_for_port(8085, timeout=3)

@pytest.mark.vm("debian-12")
def test_memory(vm):
    hungry = "x = b'x' * (200 << 20); open('/proc/sysrq-trigger', 'w').write('f'); import time; time.sleep(100)"
    vm.exec(["python3", "-c", hungry], timeout=120)

@pytest.mark.vm("debian-12")
def test_disk(vm):
    vm.exec("mount -t tmpfs -o size=1M none /srv; dd if=/dev/zero of=/srv/data bs=1M count=2")

@pytest.mark.vm("debian-12")
def test_panic(vm):
    vm.exec("echo c > /proc/sysrq-trigger")

@pytest.mark.vm("debian-12")
def test_hang(vm):
    vm.exec("echo waiting for the lock; flock /tmp/lock sleep 600 & flock /tmp/lock true", timeout=3)

@pytest.mark.vm("debian-12", name="one", network="lan")
@pytest.mark.vm("debian-12", name="two", network="lan")
def test_packets(vms):
    vms["two"].spawn(["python3", "-um", "http.server", "8000"])
    vms["two"].wait_for_port(8000)
    vms["one"].impair(loss=1.0)
    vms["one"].exec(["python3", "-c", "import urllib.request; urllib.request.urlopen('http://two:8000', timeout=3)"])

@pytest.mark.vm("debian-12")
def test_config(vm):
    vm.path("/etc/ssh/sshd_config.d/x.conf").write_text("PermitRoot no\n")
    vm.exec("sshd -t")

@pytest.mark.vm("debian-12")
def test_loop(vm):
    unit(vm, "looper", "/bin/sh -c 'echo no database at 10.0.0.9; exit 1'", "Restart=always\nRestartSec=0.2\n")
    vm.wait_for_port(8086, timeout=4)

@pytest.mark.vm("debian-12")
def test_slow(vm):
    unit(vm, "slow", "/bin/sh -c 'sleep 600'", "Type=notify\nTimeoutStartSec=2\n")
    vm.wait_for_unit("slow", timeout=30)

@pytest.mark.vm("debian-12")
def test_assertion(vm):
    assert vm.exec("cat /etc/debian_version").stdout == "thirteen\n"
"""
CAUSES = {
    "import": "No module named 'flask'",
    "memory": "OOM killer ended process",
    "disk": "No space left on device",
    "panic": "Kernel panic",
    "hang": "flock /tmp/lock true",
    "packets": "impair loss=1.0",
    "config": "Bad configuration option: PermitRoot",
    "loop": "no database at 10.0.0.9",
    "slow": "Result=timeout",
    "assertion": "thirteen",
}
"""Words that a reader has to see, by the test's name."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, vm_catalog: Catalog) -> dict[str, str]:
    """Texts of each test on the page of a run, by the test's name."""
    folder = tmp_path_factory.mktemp("causes")
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS" and not name.startswith("PYTEST_XDIST")}
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        argv, cwd=folder, env={**env, "VMBOTTLE_CATALOG": str(vm_catalog.root)}, capture_output=True, text=True, check=False
    )
    assert f"{len(CAUSES)} failed" in done.stdout, done.stdout + done.stderr
    page = (folder / "vmbottle-artifacts" / "index.html").read_text()
    texts = re.findall(r'<script type="application/json" id="test-\d+">(.*?)</script>', page)
    found = {name: text for text in texts for name in CAUSES if f"test_{name}" in text}
    assert found.keys() == CAUSES.keys()
    return found


@pytest.mark.parametrize("name", CAUSES)
def test_the_report_alone_tells_the_cause(pages: dict[str, str], name: str) -> None:
    assert CAUSES[name] in pages[name].replace("\\u0026", "&")
