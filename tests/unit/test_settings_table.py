"""The documentation's table of settings: made from `SETTINGS`, by `python tests/unit/test_settings_table.py`."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_vmbottle.settings import SETTINGS, Setting

DOCS = Path(__file__).parents[2] / "docs"
HEAD = "| option | environment | ini | values | what it decides | default |\n|---|---|---|---|---|---|\n"
TABLE = re.compile(rf"{re.escape(HEAD.splitlines()[0])}\n(?:\|.*\n)*")
COMMAND = "python tests/unit/test_settings_table.py"


def row(setting: Setting) -> str:
    env, ini = (f"{setting.env}=true", f"{setting.ini} = true") if setting.flag else (setting.env, setting.ini)
    default = ", ".join(part for part in (f"`{setting.default}`" if setting.default else "", setting.meaning) if part)
    values = ", ".join(f"`{value}`" for value in setting.takes.split("|") if value)
    return f"| `--vm-{setting.name}` | `{env}` | `{ini}` | {values} | {setting.help} | {default} |\n"


def rendered() -> str:
    return HEAD + "".join(map(row, SETTINGS))


def test_the_table_of_options_in_the_documentation_is_that_of_the_program() -> None:
    found = TABLE.findall((DOCS / "tests.md").read_text())

    assert found == [rendered()], f"{COMMAND} writes it again"


def test_the_documentation_of_the_command_line_names_every_option_that_it_has() -> None:
    text = (DOCS / "commands.md").read_text()

    assert [setting.name for setting in SETTINGS if f"`--{setting.name}`" not in text and not setting.tests_only] == []


if __name__ == "__main__":
    page = DOCS / "tests.md"
    page.write_text(TABLE.sub(lambda _: rendered(), page.read_text()))
