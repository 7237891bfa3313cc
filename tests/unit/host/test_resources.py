"""What this computer lets this process have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pytest_vmbottle.host import resources as host
from pytest_vmbottle.host.resources import ControlGroup, control_groups


def test_without_a_limit_there_is_what_the_computer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "control_groups", lambda: ())

    assert host.total_memory() == psutil.virtual_memory().total
    assert 0 < host.available_memory() <= host.total_memory()


def test_a_control_group_limits_what_is_there_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = (ControlGroup(limit=64 << 20, used=60 << 20), ControlGroup(limit=32 << 20, used=1 << 20))
    monkeypatch.setattr(host, "control_groups", lambda: groups)

    assert host.total_memory() == 32 << 20
    assert host.available_memory() == 4 << 20


def test_a_group_that_has_more_than_its_limit_has_nothing_left() -> None:
    assert ControlGroup(limit=1, used=2).free == 0


def test_groups_above_limit_too_and_cached_files_are_not_counted(tmp_path: Path) -> None:
    membership, mounted = tmp_path / "cgroup", tmp_path / "fs"
    (mounted / "a" / "b").mkdir(parents=True)
    (mounted / "a" / "memory.max").write_text(f"{1 << 30}\n")
    (mounted / "a" / "memory.current").write_text(f"{500 << 20}\n")
    (mounted / "a" / "memory.stat").write_text(f"anon 7\nactive_file {100 << 20}\ninactive_file {50 << 20}\n")
    (mounted / "a" / "b" / "memory.max").write_text("max\n")
    membership.write_text("0::/a/b\n")

    assert control_groups(membership, mounted) == (ControlGroup(limit=1 << 30, used=350 << 20),)


def test_the_limit_of_version_1_is_found_too_and_its_way_to_say_none(tmp_path: Path) -> None:
    membership, mounted = tmp_path / "cgroup", tmp_path / "fs"
    job = mounted / "memory" / "job"
    job.mkdir(parents=True)
    membership.write_text("5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    (job / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert control_groups(membership, mounted) == ()

    (job / "memory.limit_in_bytes").write_text("536870912\n")
    (job / "memory.usage_in_bytes").write_text("400000000\n")
    (job / "memory.stat").write_text("inactive_file 1\ntotal_active_file 100000000\ntotal_inactive_file 50000000\n")
    assert control_groups(membership, mounted) == (ControlGroup(limit=512 << 20, used=250_000_000),)


def test_a_container_that_sees_its_own_group_as_the_topmost_is_limited_by_that(tmp_path: Path) -> None:
    membership, mounted = tmp_path / "cgroup", tmp_path / "fs"
    (mounted / "memory").mkdir(parents=True)
    membership.write_text("4:memory:/docker/0123\n")
    (mounted / "memory" / "memory.limit_in_bytes").write_text("536870912\n")

    assert [group.limit for group in control_groups(membership, mounted)] == [512 << 20]


def test_a_process_shows_what_it_takes() -> None:
    before = host.Process(os.getpid()).usage()
    assert before is not None
    held = b"x" * (64 << 20)
    sum(range(3_000_000))
    after = host.Process(os.getpid()).usage()

    assert after is not None
    assert after.cpu_seconds > before.cpu_seconds
    assert after.rss_bytes - before.rss_bytes > len(held) // 2
    assert after.threads >= 1


def test_a_process_that_has_ended_takes_nothing_not_even_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = host.Process(child.pid)
    assert process.usage() is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still there for its parent to ask about

    assert process.usage() is None
    child.communicate()
    assert process.usage() is None
    assert host.Process(child.pid).usage() is None
