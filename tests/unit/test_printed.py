"""Pages that are followed as they are printed: what is written, what is run, and what is compared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.real.printed import Reader

PAGE = """
```ini title="a folder/app.ini"
name = kettle
```

```console
$ cat "a folder/app.ini"
name = kettle
$ printf '%s\\n' start '====== 3 passed in 2.50s ======' end
=== 3 passed in 12.34s ===
```

<!-- status 1 -->
```console
$ false
```

```sh
rm -rf everything
```
"""


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path, dict(os.environ))


def test_files_are_written_and_commands_are_run_as_they_stand(reader: Reader) -> None:
    assert reader.follow(PAGE) == 3
    assert [str(path.relative_to(reader.folder)) for path in reader.folder.rglob("*.ini")] == ["a folder/app.ini"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("name = kettle\n$", "and not\nname = teapot"),
        ("=== 3 passed in 12", "and not\n=== 4 passed"),
        ("<!-- status 1 -->\n", "false: status 1"),
    ],
    ids=["output", "figure", "status"],
)
def test_what_a_page_shows_wrongly_is_found(reader: Reader, wrong: str, told: str) -> None:
    right = {"name = kettle\n$": "name = teapot\n$", "=== 3 passed in 12": "=== 4 passed in 12", "<!-- status 1 -->\n": ""}
    assert PAGE.count(wrong) == 1

    with pytest.raises(AssertionError) as caught:
        reader.follow(PAGE.replace(wrong, right[wrong]))
    assert told in str(caught.value)
