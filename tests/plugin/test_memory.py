"""The memory budget, as a run sees it: machines wait for those of other processes, and this is told."""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_vmbottle.catalog.memory_budget import Budget
from pytest_vmbottle.host.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    Run = Callable[..., pytest.RunResult]

ONE = '@pytest.mark.vm("debian-12", memory="1G")\ndef test_it(vm): pass\n'


def said(result: pytest.RunResult) -> str:
    return result.stdout.str() + "\n" + result.stderr.str()


def test_a_run_waits_for_memory_that_another_process_holds_and_says_for_how_long(run: Run, catalog: Path) -> None:
    other = Budget(catalog / "budget", limit=1 << 30)
    with ExitStack() as stack:
        stack.enter_context(other.reserve(1 << 30, name="other", deadline=Deadline(60), waiting=print))

        def give_back() -> None:
            Deadline(60).poll(lambda: list((catalog / "budget").glob("*.waiting")))
            threading.Event().wait(2.5)  # until it is told
            stack.close()

        thread = threading.Thread(target=give_back)
        thread.start()
        text = said(run(ONE, "--vm-memory-budget=1G", passed=1))
        thread.join()

    assert re.search(r"vmbottle: .*1\.0 GiB .* \d s: .*1\.0 GiB .* \d+", text)
    assert re.search(r"[2-9]\d*\.\d s .*memory", text)
    assert list((catalog / "budget").iterdir()) == []


def test_a_machine_that_can_never_fit_into_the_budget_is_an_error_at_once(run: Run) -> None:
    text = said(run(ONE, "--vm-memory-budget=512M", status=1, errors=1))

    assert "memory=1.0 GiB" in text
    assert "provisioner.py" not in text
