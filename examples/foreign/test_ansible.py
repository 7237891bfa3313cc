"""A playbook of Ansible with a machine as its host: become, synchronize, reboot and wait_for_connection."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, layer

PLAYBOOK = Path(__file__).with_name("site.yml")


@layer("debian-12", packages=["acl", "rsync"])
def with_ann(vm: Machine) -> None:
    """An ordinary user who can log in as root can, and may become root."""
    vm.exec("useradd --create-home --shell /bin/bash ann && cp -r /root/.ssh /home/ann && chown -R ann: /home/ann/.ssh")
    vm.path("/etc/sudoers.d/ann").write_text("ann ALL=(ALL) NOPASSWD: ALL\n", mode=0o440)


@pytest.mark.vm(with_ann)
def test_a_playbook_runs_twice_and_the_second_time_changes_only_what_it_must(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("hello\n")
    before = vm.path("/proc/sys/kernel/random/boot_id").read_text()
    config = vm.ssh_config()
    program = Path(sys.executable).with_name("ansible-playbook")
    words = [program, "-i", f"{vm.name},", "-u", "ann", "-e", f"tree={tmp_path}/site", PLAYBOOK]
    own = {
        "HOME": str(tmp_path),
        "ANSIBLE_TIMEOUT": "120",
        "ANSIBLE_SSH_COMMON_ARGS": f"-F {config}",
        "ANSIBLE_HOST_KEY_CHECKING": "false",
        "ANSIBLE_LOCAL_TEMP": str(tmp_path),
    }
    changed = []
    for _ in range(2):
        ended = subprocess.run([*map(str, words)], env={**os.environ, **own}, check=False, timeout=500, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        changed += re.findall(r"changed=(\d+)", ended.stdout)
    assert changed == ["3", "1"], "a reboot is always a change"
    assert vm.path("/srv/site/index.html").read_text() == "hello\n"
    assert vm.path("/etc/app.conf").read_text() == "port = 8080\n"
    assert vm.path("/proc/sys/kernel/random/boot_id").read_text() != before
