"""The examples that users read, on the real smolvm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "test_portable.py"


def test_the_examples_for_both_backends_pass_on_this_one_and_so_does_that_of_its_page(environment: dict[str, str], tmp_path: Path) -> None:
    page = EXAMPLE.parents[1] / "docs" / "smolvm.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL) if page.exists() else []
    (tmp_path / "test_page.py").write_text("\n".join(blocks))
    argv = [sys.executable, "-m", "pytest", "-q", "--vm-backend=smolvm", str(EXAMPLE), str(tmp_path)]
    ended = subprocess.run(argv, check=False, cwd=EXAMPLE.parents[1], env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{10 + len(blocks)} passed" in ended.stdout
