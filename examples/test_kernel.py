"""A machine has a kernel of its own: modules and kernel settings can be tested for real, and the host's stay as they are."""

from __future__ import annotations

import pytest

from pytest_vmbottle import CommandFailed, Machine

pytestmark = pytest.mark.vm("debian-12")


def test_module_brings_its_network_interface(vm: Machine) -> None:
    assert not vm.path("/sys/module/dummy").exists()
    vm.exec(["modprobe", "dummy", "numdummies=2"])
    vm.exec("ip address add 10.9.8.7/24 dev dummy1 && ip link set dummy1 up")
    assert " dev dummy1 " in vm.exec(["ip", "route", "get", "10.9.8.1"]).stdout
    vm.exec(["modprobe", "--remove", "dummy"])
    assert not vm.path("/sys/class/net/dummy1").exists()


def test_unknown_module_is_refused(vm: Machine) -> None:
    with pytest.raises(CommandFailed, match="no_such_module"):
        vm.exec(["modprobe", "no_such_module"])


@pytest.mark.parametrize("value", ["0", "1"])
def test_sysctl_file_takes_effect(vm: Machine, value: str) -> None:
    vm.path("/etc/sysctl.d/90-router.conf").write_text(f"net.ipv4.ip_forward = {value}\n")
    vm.exec(["sysctl", "--system"])
    assert vm.path("/proc/sys/net/ipv4/ip_forward").read_text() == f"{value}\n"
