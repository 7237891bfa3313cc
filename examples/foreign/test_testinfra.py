"""Modules of pytest-testinfra by `vm.host`: they tell the same as by its own connection over SSH."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import testinfra

from pytest_vmbottle import Machine

ASKED: dict[str, Callable[[Any], object]] = {
    "addr": lambda host: (host.addr("localhost").is_resolvable, host.addr("localhost").port(22).is_reachable),
    "block_device": lambda host: (host.block_device("/dev/vda").sector_size, host.block_device("/dev/vda").size),
    "command": lambda host: (host.run("echo out; echo err >&2; exit 3").rc, host.check_output("echo %s", "a  'b'"), host.exists("sh")),
    "environment": lambda host: host.environment()["HOME"],
    "file": lambda host: [getattr(host.file("/etc/passwd"), name) for name in ("user", "group", "mode", "size", "sha256sum", "mtime")],
    "file of another kind": lambda host: (host.file("/dev/null").is_file, host.file("/bin").is_symlink, host.file("/srv").is_directory),
    "group": lambda host: (host.group("root").gid, host.group("nobody").exists),
    "interface": lambda host: (host.interface("lo").addresses, host.interface("none").exists),
    "mount_point": lambda host: (host.mount_point("/").filesystem, host.mount_point("/proc").options),
    "package": lambda host: (host.package("bash").version, host.package("nothing").is_installed),
    "process": lambda host: [each.comm for each in host.process.filter(pid="1")],
    "service": lambda host: (host.service("ssh").is_running, host.service("ssh").is_enabled, host.service("none").exists),
    "socket": lambda host: host.socket("tcp://22").is_listening,
    "sysctl": lambda host: host.sysctl("kernel.ostype"),
    "system_info": lambda host: (host.system_info.type, host.system_info.distribution, host.system_info.codename, host.system_info.arch),
    "user": lambda host: [getattr(host.user("nobody"), name) for name in ("uid", "gid", "home", "shell", "groups")],
}


@pytest.mark.vm("debian-12", packages=["procps", "sudo"], network=True)
@pytest.mark.parametrize("module", ASKED)
def test_a_module_tells_the_same_as_over_ssh(module: str, session_vm: Machine) -> None:
    over_ssh = testinfra.get_host(f"ssh://{session_vm.name}", ssh_config=str(session_vm.ssh_config()))
    assert ASKED[module](session_vm.host) == ASKED[module](over_ssh)
