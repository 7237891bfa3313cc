"""What a guest's own records say, read from answers as guests give them."""

from __future__ import annotations

from pytest_vmbottle.machine import guestlog

KERNEL = """[  445.426078] systemd invoked oom-killer: gfp_mask=0x140cca
[  445.463100] Out of memory: Killed process 631 (python3) total-vm:894740kB, anon-rss:883600kB, UID:0 pgtables:1788kB oom_score_adj:0
[  449.100000] Memory cgroup out of memory: Killed process 77 (\x1b[31m) total-vm:1kB
450.51 23.81
"""
UNITS = """100.00 90.00
Id=old.service\nActiveState=failed\nSubState=failed\nResult=exit-code\nNRestarts=0\nStateChangeTimestampMonotonic=20000000

Id=well.service\nActiveState=active\nSubState=running\nResult=success\nNRestarts=0\nStateChangeTimestampMonotonic=95000000

Id=bad.service\nActiveState=failed\nSubState=failed\nResult=exit-code\nNRestarts=0\nStateChangeTimestampMonotonic=96000000

Id=loop.service\nActiveState=activating\nSubState=auto-restart\nResult=exit-code\nNRestarts=4\nStateChangeTimestampMonotonic=95000000
"""


def test_only_whom_the_oom_killer_ended_lately_is_told_without_control_characters() -> None:
    assert guestlog.killed(KERNEL, 30) == ["631 (python3)", "77 (\\x1b[31m)"]
    assert guestlog.killed(KERNEL, 1) == ["77 (\\x1b[31m)"]


def test_units_that_failed_or_were_restarted_lately_are_told_in_order() -> None:
    assert [unit.name for unit in guestlog.troubled(UNITS, 30)] == ["loop.service", "bad.service"]
    assert [unit.name for unit in guestlog.troubled(UNITS, float("inf"))] == ["old.service", "loop.service", "bad.service"]
    assert "4 times" in str(guestlog.troubled(UNITS, 30)[0])


def test_an_answer_that_makes_no_sense_tells_of_nothing() -> None:
    for said in ("", "\n", "nonsense", "x=1\n\n=\n", "1e999 1\nId=\n"):
        assert (guestlog.killed(said, 5), guestlog.troubled(said, 5)) == ([], [])


def test_a_journal_is_bounded_and_fit_to_be_shown() -> None:
    shown = guestlog.shortened("early\n" + "\x1b" * 5000 + "\n" + "line\n" * 39)
    assert "early" not in shown
    assert "\x1b" not in shown
    assert len(shown) < 5000
