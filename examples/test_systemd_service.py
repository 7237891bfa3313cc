"""Does systemd bring our service back when it is killed? The test ends it as the kernel's OOM killer would."""

from __future__ import annotations

import pytest

from pytest_vmbottle import Machine

UNIT = """\
[Service]
ExecStart=/usr/bin/sleep infinity
Restart=always
RestartSec=100ms
"""


@pytest.fixture
def service(vm: Machine) -> Machine:
    """A machine on which the service has been installed and runs."""
    vm.path("/etc/systemd/system/patient.service").write_text(UNIT)
    vm.exec(["systemctl", "start", "patient.service"])
    vm.wait_for_unit("patient.service")
    return vm


def main_pid(vm: Machine) -> int:
    return int(vm.exec(["systemctl", "show", "--value", "--property=MainPID", "patient.service"]).stdout)


@pytest.mark.vm("debian-12")
def test_service_comes_back_after_kill_9(service: Machine) -> None:
    before = main_pid(service)
    service.exec(["kill", "-9", str(before)])

    def another_process() -> bool:
        return main_pid(service) not in (0, before)

    service.wait_until(another_process)
    assert service.path(f"/proc/{main_pid(service)}/comm").read_text() == "sleep\n"


@pytest.mark.vm("debian-12")
def test_service_that_was_stopped_stays_stopped(service: Machine) -> None:
    service.exec(["systemctl", "stop", "patient.service"])
    state = service.exec(["systemctl", "is-active", "patient.service"], check=False)
    assert (state.returncode, state.stdout) == (3, "inactive\n")
