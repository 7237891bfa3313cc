"""Artifacts of runs that never were, in the documented format: planted failures, many events, and hostile texts."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle.report.run import EVENTS, MARK, OUTCOME

BEGAN = 1_790_000_000.0
HOSTILE = (
    "<script>alert('x')</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "--><img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "javascript:alert(4)",
    "https://evil.example/steal?x=1",
    "\u202egnp.exe\u202c \u2066inside\u2069 \u200f",
    "nul \x00 bell \x07 escape \x1b[31mred\x1b[0m \x9b2J",
    "line \u2028 paragraph \u2029 end",
    "lone \ud800 surrogate \udfff",
    "{{data}} {{scripts}} {{policy}} \\u003c &lt; &amp;",
    "::error::owned\n##vso[task.complete]",
    "__proto__ constructor",
)


@attrs.frozen
class Planted:
    """A failure with the words that tell its cause."""

    name: str
    cause: str
    error: str
    events: list[dict[str, Any]]
    traceback: str = ""


def _command(argv: list[str], status: int, stdout: str = "", stderr: str = "", seconds: float = 0.1) -> dict[str, Any]:
    return {"kind": "command", "argv": argv, "user": "root", "status": status, "stdout": stdout, "stderr": stderr, "seconds": seconds}


def _said(*lines: str) -> list[dict[str, Any]]:
    return [{"kind": "console", "text": line} for line in lines]


def _wait(verb: str, *args: str, error: str, seconds: float = 10.0) -> dict[str, Any]:
    return {"kind": "wait", "verb": verb, "args": [*args], "seconds": seconds, "error": error}


PLANTED = (
    Planted(
        "import_error",
        "ModuleNotFoundError: No module named 'redis'",
        "WaitTimeout: port 8080 is not open after 10 s",
        [
            _command(["systemctl", "start", "shopd"], 0),
            *_said("shopd[412]: Traceback (most recent call last):", "shopd[412]: ModuleNotFoundError: No module named 'redis'"),
            _wait("wait_for_port", "8080", error="WaitTimeout: port 8080 is not open after 10 s"),
        ],
    ),
    Planted(
        "oom",
        "Out of memory: Killed process 733 (importer)",
        "AssertionError: assert 'done' in ''",
        [
            {"kind": "spawn", "argv": ["importer", "--all"], "user": "app"},
            *_said("importer invoked oom-killer: gfp_mask=0x140cca", "Out of memory: Killed process 733 (importer) total-vm:912340kB"),
            {"kind": "exit", "argv": ["importer", "--all"], "status": 137},
        ],
    ),
    Planted(
        "full_disk",
        "No space left on device",
        "CommandFailed: pg_restore /srv/dump: status 1",
        [
            _command(
                ["pg_restore", "/srv/dump"], 1, stderr="pg_restore: error: could not write to file: No space left on device\n", seconds=3.2
            )
        ],
    ),
    Planted(
        "panic",
        "Kernel panic - not syncing: Fatal exception in interrupt",
        "MachineDied: the guest's kernel panicked",
        [
            _command(["modprobe", "shiny"], 0),
            *_said(
                "BUG: unable to handle page fault for address: ffffffffc0de", "Kernel panic - not syncing: Fatal exception in interrupt"
            ),
        ],
    ),
    Planted(
        "hung_task",
        "task kworker/0:2:91 blocked for more than 120 seconds",
        "CommandTimeout: sync: no answer after 150 s",
        [
            *_said("INFO: task kworker/0:2:91 blocked for more than 120 seconds."),
            {"kind": "command", "argv": ["sync"], "user": "root", "seconds": 150.0, "error": "CommandTimeout: sync: no answer after 150 s"},
        ],
    ),
    Planted(
        "lost_packets",
        "42% packet loss",
        "AssertionError: assert 42 == 0",
        [
            {"kind": "network", "verb": "impair", "args": ["loss=0.4"], "seconds": 0.05},
            _command(
                ["ping", "-c", "50", "db"], 1, stdout="50 packets transmitted, 29 received, 42% packet loss\n", stderr="42% packet loss\n"
            ),
        ],
    ),
    Planted(
        "wrong_config",
        'unknown directive "listn" in /etc/nginx/nginx.conf:4',
        "CommandFailed: systemctl restart nginx: status 1",
        [
            {"kind": "file", "verb": "write_text", "path": "/etc/nginx/nginx.conf", "args": ["<84 bytes>"], "seconds": 0.02},
            _command(["nginx", "-t"], 1, stderr='nginx: [emerg] unknown directive "listn" in /etc/nginx/nginx.conf:4\n'),
        ],
    ),
    Planted(
        "crash_loop",
        "agentd.service: Start request repeated too quickly.",
        "WaitTimeout: agentd.service is not active after 30 s",
        [
            *(line for _ in range(5) for line in _said("agentd.service: Main process exited, code=dumped, status=11/SEGV")),
            *_said("agentd.service: Start request repeated too quickly."),
            _wait("wait_for_unit", "agentd.service", error="WaitTimeout: agentd.service is not active after 30 s", seconds=30.0),
        ],
    ),
    Planted(
        "slow_unit",
        "db-migrate.service is activating after 60 s",
        "WaitTimeout: db-migrate.service is activating after 60 s",
        [
            {"kind": "answer", "text": "activating"},
            _wait("wait_for_unit", "db-migrate.service", error="WaitTimeout: db-migrate.service is activating after 60 s", seconds=60.0),
        ],
    ),
    Planted(
        "wrong_assertion",
        "assert '2.4.57' == '2.4.58'",
        "AssertionError: assert '2.4.57' == '2.4.58'",
        [_command(["httpd", "-v"], 0, stdout="2.4.57\n")],
        "def test_version(vm):\n>   assert vm.exec(['httpd', '-v']).stdout.strip() == '2.4.58'\n"
        "E   AssertionError: assert '2.4.57' == '2.4.58'\n",
    ),
)


def write_test(folder: Path, events: Iterable[dict[str, Any]], *, machines: Iterable[str] = ("web",), **facts: Any) -> Path:
    """Writes one test's folder; events without a time follow each other by a tenth of a second, or by what they take."""
    folder.mkdir(parents=True)
    (folder.parent / MARK).write_text("run-1\n")
    time, lines = BEGAN, []
    names = [*machines]
    for event in events:
        lines.append(json.dumps({"machine": names[0] if names else "", "time": time, **event}))
        seconds = event.get("seconds")
        time = max(time, float(event.get("time", time))) + max(0.1, seconds if isinstance(seconds, float) else 0.0)
    (folder / EVENTS).write_text("".join(f"{line}\n" for line in lines))
    for name in names:
        (folder / name / "outputs").mkdir(parents=True, exist_ok=True)
        (folder / name / "console.txt").write_text("Linux version 6.1\n")
        (folder / name / "journal.txt").write_text("systemd[1]: Reached target\n")
    known = {"nodeid": f"tests/test_shop.py::{folder.name}", "outcome": "failed", "phase": "call", "began": BEGAN, "ended": time}
    (folder / OUTCOME).write_text(json.dumps({**known, "machines": {name: name for name in names}, **facts}))
    return folder


def write_planted(run: Path) -> Path:
    """Writes a run with the planted failures, and a test that passed."""
    for planted in PLANTED:
        write_test(
            run / f"test_{planted.name}",
            [_phase("setup", "began"), _phase("setup", "passed"), _phase("call", "began"), *planted.events, _phase("call", "failed")],
            error=planted.error,
            traceback=planted.traceback or f"E   {planted.error}\n",
            sections=[["Captured log call", "INFO shop ready\n"]],
        )
    write_test(run / "test_fine", [_command(["true"], 0)], outcome="passed")
    return run


def _phase(phase: str, state: str) -> dict[str, Any]:
    return {"kind": "phase", "phase": phase, "state": state, "nodeid": "tests/test_shop.py::test"}


def many_events(count: int, seconds: float = 120.0) -> list[dict[str, Any]]:
    """Events of a long test on two machines, of every kind, with the planted full disk at the end."""
    made = [_phase("setup", "began"), _phase("setup", "passed"), _phase("call", "began")]
    samples = count // 8
    made += [_one_of_many(number, count) for number in range(count - samples - 5)]
    made += [*PLANTED[2].events, _phase("call", "failed")]
    timed = [{**event, "time": BEGAN + number * seconds / len(made)} for number, event in enumerate(made)]
    timed += [_sample(number, samples, BEGAN + number * seconds / samples) for number in range(samples)]
    return sorted(timed, key=lambda event: float(event["time"]))


def _sample(number: int, samples: int, time: float) -> dict[str, Any]:
    share, name = number / samples, ("web", "db")[number % 2]
    cpu = (45, 30)[number % 2] + 28 * math.sin(share * 30 + number % 2) + number * 13 % 11
    return {
        "kind": "metrics",
        "machine": name,
        "time": time,
        "cpu_percent": round(cpu, 1),
        "rss_bytes": int((280 + 600 * share**2) * 2**20),
    }


def _one_of_many(number: int, count: int) -> dict[str, Any]:
    # Shorter where there are more of them, so that the machines have about as much to do.
    scale = 1000 / count * (0.5 + number * 37 % 11 / 10)
    machine = "db" if number // 5 % 3 == 1 else "web"
    return {"machine": machine, **(_rare(number, scale) or _frequent(number, scale))}


def _rare(number: int, scale: float) -> dict[str, Any] | None:
    if number % 250 == 20:
        return {"kind": "snapshot", "verb": "snapshot", "args": [f"before-{number}"], "seconds": 1.6 * scale}
    if number % 100 == 43:
        return {"kind": "note", "text": f"round {number // 100}"}
    if number % 330 == 71:
        return {"kind": "console", "text": f"[{number / 10:12.6f}] blk_update_request: I/O error, dev vda, sector {number * 8}"}
    return None


def _frequent(number: int, scale: float) -> dict[str, Any]:
    events = [
        _command(["systemctl", "is-active", f"job-{number}.service"], 0, f"active\njob {number} of many\n", seconds=0.7 * scale),
        {"kind": "console", "text": f"[{number / 10:12.6f}] shopd[412]: request {number} took {number % 37} ms"},
        {"kind": "file", "verb": "write_text", "path": f"/srv/in/{number}.json", "args": ["<84 bytes>"], "seconds": 0.3 * scale},
        {"kind": "console", "text": f"[{number / 10:12.6f}] systemd[1]: job-{number}.service: Deactivated successfully."},
        {"kind": "wait", "verb": "wait_for_port", "args": ["5432"], "seconds": 1.1 * scale},
        {"kind": "console", "text": f"[{number / 10:12.6f}] postgres[96]: checkpoint complete: wrote {number % 900} buffers"},
    ]
    return events[number % len(events)]


def write_many(run: Path, count: int) -> Path:
    """Writes a run with one failed test of many events."""
    planted = PLANTED[2]
    facts = {"error": planted.error, "traceback": f"E   {planted.error}\n", "began": BEGAN, "ended": BEGAN + 125.0}
    write_test(
        run / "test_restore", many_events(count), machines=("web", "db"), sections=[["Captured log call", "INFO start\n" * 50]], **facts
    )
    return run


def write_hostile(run: Path) -> Path:
    """Writes a test in which all texts are hostile, and one whose times are absurd."""
    both = "\n".join(HOSTILE)
    events: list[dict[str, Any]] = []
    for text in (*HOSTILE, both):
        events += [
            {"kind": "console", "text": text},
            {"kind": text, "text": text, text: text},
            {"kind": "command", "argv": [text, text], "cwd": text, "user": text, "status": 1, "stdout": text, "stderr": text, "note": text},
            {"kind": "file", "verb": text, "path": text, "args": [text, {text: text}], "seconds": 0.1, "error": text},
            {"kind": "note", "text": text, "machine": text},
            {"kind": "phase", "phase": text, "state": text},
        ]
    events += [
        {"kind": "metrics", "cpu_percent": float("nan"), "rss_bytes": 10**400, "threads": "many", "read_bytes": float("inf")},
        {"kind": "command", "argv": "x" * 10_000_000, "status": float("inf"), "stdout": "\x00" * 10_000_000, "seconds": float("nan")},
        {"kind": ["list"], "text": {"an": "object"}, "status": "0", "seconds": "long", "machine": 5},
        {"kind": "command", "argv": None, "args": 5, "stdout_file": "../../../etc/passwd", "deep": json.loads("[" * 20 + "]" * 20)},
    ]
    write_test(
        run / "test_hostile",
        events,
        nodeid=f"test_hostile[{both}]",
        phase=both,
        error=both,
        traceback=both,
        worker=both,
        sections=[[text, text] for text in HOSTILE],
        machines=("web",),
    )
    far = 9e14
    odd = [{"kind": "command", "argv": ["sleep"], "time": -far, "seconds": far}, {"kind": "note", "text": "later", "time": far}]
    write_test(run / "test_odd", odd, began=far, ended=-1.0)
    return run


def png(width: int = 8, height: int = 8) -> bytes:
    """A black picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(3 * width)) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
