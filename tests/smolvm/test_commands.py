"""What tests/real says of commands in QEMU's guests holds in smolvm's: the very same tests, on another machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm(backend="smolvm", memory="256M")

LEFT_OUT = {
    "test_a_hundred_megabytes_of_output_are_cut_with_a_mark_in_bounded_memory",  # 100 MB take minutes where smolvm's guest is emulated
    "test_output_that_nobody_reads_does_not_hold_the_command_up_and_its_end_is_kept",  # the same, for 20 MB
    "test_a_lost_connection_ends_it_with_an_error_and_the_next_command_gets_a_new_one",  # each command has a connection of its own
    # It takes sudo, which smolvm's Alpine has not.
    "test_a_timeout_also_kills_what_shed_its_environment_user_and_session_and_says_that_this_held_the_output",
    # It is about the unit of the guest agent, and there is neither.
    "test_what_the_oom_killer_ends_is_said_and_it_ends_nothing_else",
    "test_it_ends_with_its_machine",  # here by tests/smolvm/test_machines.py, which has a machine to cut off anyway
}


def _tests_of(name: str) -> Iterator[tuple[str, Callable[..., None]]]:
    path = Path(__file__).parents[1] / "real" / name
    spec = importlib.util.spec_from_file_location(f"shared_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ((key, value) for key, value in vars(module).items() if key.startswith("test_") and key not in LEFT_OUT)


globals().update(_tests_of("test_exec.py"))
globals().update(_tests_of("test_spawn.py"))
