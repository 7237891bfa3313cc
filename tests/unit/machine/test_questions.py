"""Which units a journal says to have failed, and what they said last."""

from __future__ import annotations

import datetime as dt

from pytest_vmbottle.machine.questions import troubles_in

JOURNAL = """\
Sun 2026-11-29 06:00:00 UTC debian init.scope[1]: old.service: Failed with result 'exit-code'.
Sun 2026-11-29 06:33:50 UTC debian web.service[514]: Traceback (most recent call last):
Sun 2026-11-29 06:33:50 UTC debian web.service[514]: ModuleNotFoundError: No module named 'nothing'
Sun 2026-11-29 06:33:50 UTC debian init.scope[1]: web.service: Failed with result 'exit-code'.
Sun 2026-11-29 06:33:51 UTC debian ssh.service[300]: Accepted publickey for root
Sun 2026-11-29 06:33:52 UTC debian loop.service[600]: cannot bind
Sun 2026-11-29 06:33:52 UTC debian init.scope[1]: loop.service: Scheduled restart job, restart counter is at 3.
Sun 2026-11-29 06:33:53 UTC debian ssh.service[300]: fake.service: Failed with result 'none'.
"""
SINCE = dt.datetime(2026, 11, 29, 6, 33, 45, tzinfo=dt.UTC).timestamp()


def test_units_that_failed_or_were_restarted_since_then_are_told_with_their_last_words() -> None:
    assert troubles_in(JOURNAL, since=SINCE) == [
        "web.service:",
        "  Traceback (most recent call last):",
        "  ModuleNotFoundError: No module named 'nothing'",
        "  web.service: Failed with result 'exit-code'.",
        "loop.service:",
        "  cannot bind",
        "  loop.service: Scheduled restart job, restart counter is at 3.",
    ]


def test_a_journal_without_failures_tells_nothing() -> None:
    assert troubles_in("", since=SINCE) == []
    assert troubles_in("no journal files were found\n\0\x1b", since=SINCE) == []
    assert troubles_in(JOURNAL, since=SINCE + 3600) == []


def test_of_many_units_and_lines_the_last_are_told() -> None:
    lines = [
        f"Sun 2026-11-29 06:33:{50 + unit % 10} UTC d init.scope[1]: u{unit}.service: Failed with result '{number}'."
        for unit in range(30)
        for number in range(30)
    ]
    told = troubles_in("\n".join(lines), since=SINCE)

    assert [line for line in told if not line.startswith(" ")] == [f"u{unit}.service:" for unit in range(25, 30)]
    assert len(told) == 5 * 7
