"""Baselines of `vm_benchmark`: the counts that it compares with, and those that it stores."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.plugin.baselines import Baselines, Benchmark
from pytest_vmbottle.testing import FakeBackend, FakeChannel, FakeInstance


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "counts.json"


def test_the_first_count_is_stored_and_later_ones_are_compared_with_it(file: Path) -> None:
    baselines = Baselines(file, renew=False)

    assert baselines.baseline("a test", "QEMU 7", 100) is None
    assert baselines.baseline("a test", "QEMU 7", 200) == 100
    assert Baselines(file, renew=False).baseline("a test", "QEMU 7", 300) == 100


def test_each_version_of_the_emulator_and_each_work_has_a_baseline_of_its_own(file: Path) -> None:
    baselines = Baselines(file, renew=False)
    baselines.baseline("a test", "QEMU 7", 100)

    assert baselines.baseline("a test", "QEMU 8", 200) is None
    assert baselines.baseline("another test", "QEMU 7", 300) is None
    assert json.loads(file.read_text()) == {"a test": {"QEMU 7": 100, "QEMU 8": 200}, "another test": {"QEMU 7": 300}}


def test_a_baseline_is_replaced_only_if_that_is_asked_for(file: Path) -> None:
    Baselines(file, renew=False).baseline("a test", "QEMU 7", 100)

    assert Baselines(file, renew=True).baseline("a test", "QEMU 7", 200) is None
    assert Baselines(file, renew=False).baseline("a test", "QEMU 7", 300) == 200


def test_nothing_is_lost_if_many_store_at_once(file: Path) -> None:
    def store(number: int) -> None:
        Baselines(file, renew=False).baseline(f"test {number}", "QEMU 7", number + 1)

    threads = [threading.Thread(target=store, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(file.read_text()) == {f"test {number}": {"QEMU 7": number + 1} for number in range(20)}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"b": "1"}}', '{"a": {"b": 0}}', '{"a": {"b": true}}', "[" * 100_000])
def test_a_file_of_something_else_is_refused_and_stays(file: Path, text: str) -> None:
    file.write_text(text)

    with pytest.raises(SpecError, match="baselines"):
        Baselines(file, renew=True).baseline("a test", "QEMU 7", 100)
    assert file.read_text() == text


def test_a_function_with_keywords_of_commands_is_refused_and_not_called(tmp_path: Path, file: Path) -> None:
    backend = FakeBackend()
    channel = FakeChannel(backend.handler)
    machine = Machine(FakeInstance(backend, tmp_path), MachineSpec(source="x"), id="m", backend="fake", channel=channel)
    benchmark = Benchmark(baselines=Baselines(file, renew=False), test="a test", emulator_of=lambda _: "QEMU 7", say=print)

    with pytest.raises(ValueError, match=r"env, user: .*where the function calls"):
        benchmark(machine, lambda: pytest.fail("it was called"), env={"A": "1"}, user="nobody")
    assert not file.exists()
