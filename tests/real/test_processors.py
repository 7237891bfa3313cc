"""The processor that a guest was to have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_vmbottle import LaunchError, Machine


def test_a_processor_that_qemu_does_not_know_is_told_in_its_own_words(vm_factory: Callable[..., Machine]) -> None:
    with pytest.raises(LaunchError, match="unable to find CPU model 'Transistor'"):
        vm_factory("debian-12", cpu="Transistor,+svm", fresh="boot")


def test_a_feature_that_qemu_does_not_know_is_told_in_its_own_words(vm_factory: Callable[..., Machine]) -> None:
    with pytest.raises(LaunchError, match=r"cpu\.flying-carpet' not found"):
        vm_factory("debian-12", cpu="max,+flying-carpet", fresh="boot")
