"""Figures in the text format of Prometheus."""

from __future__ import annotations

import re

from pytest_vmbottle.service.figures import exposition

LINE = re.compile(r'(# (HELP|TYPE) [a-z_]+ .+|[a-z_:]+\{[a-z]+="([^"\\\n]|\\.)*"(,[a-z]+="([^"\\\n]|\\.)*")*\} -?[0-9.e+-]+)')


def test_each_machine_has_its_state_and_those_that_run_their_figures() -> None:
    machines = [{"name": "web", "state": "running"}, {"name": "db", "state": "stopped"}]
    figures = {
        "web": {"ts": 1.5, "time": 3.0, "cpu_percent": 12.5, "rss_bytes": 1024, "rss_human": "1 KiB", "read_bytes": 7, "guest_load": None}
    }
    text = exposition(machines, figures)

    assert all(LINE.fullmatch(line) for line in text.splitlines()), text
    assert text.endswith("\n")
    lines = text.splitlines()
    assert 'vmbottle_machines{state="running"} 1' in lines
    assert 'vmbottle_machines{state="error"} 0' in lines
    assert 'vmbottle_machine_state{name="web",state="running"} 1' in lines
    assert 'vmbottle_machine_state{name="db",state="running"} 0' in lines
    assert 'vmbottle_machine_cpu_percent{name="web"} 12.5' in lines
    assert 'vmbottle_machine_rss_bytes{name="web"} 1024' in lines
    assert "# TYPE vmbottle_machine_read_bytes_total counter" in lines
    assert not any(word in text for word in ("human", "load", "_ts", "_time"))


def test_names_are_escaped() -> None:
    text = exposition([{"name": 'a"b\\c\nd', "state": "error"}], {})

    assert 'vmbottle_machine_state{name="a\\"b\\\\c\\nd",state="error"} 1' in text.splitlines()


def test_an_empty_catalog_has_the_states_all_the_same() -> None:
    assert exposition([], {}).count("vmbottle_machines{") == 6
