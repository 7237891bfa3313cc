"""Time of `vmbottle ci plan` for a suite of 5,000 tests, next to pytest that only collects it: `python benchmarks/plan.py [-n N]`.

The suite was never run, as on the runner of a CI that plans: nothing of it is compiled yet. Of all runs the quickest counts, since other
work on the computer only adds to it. It exits with 1 if a plan takes more than 5 seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES, TESTS, LAYERS = 200, 25, 10
MOST_SECONDS = 5.0
LAYER = """
@layer({below})
def layer_{number}(vm):
    vm.exec("apt-get install -y package-{number}")
"""
PLAIN = """
@pytest.mark.parametrize("value", [{number}])
def test_without_a_machine_{number}(value):
    assert str(value) in "0123456789 {number}"
"""
WITH_MACHINE = """
@pytest.mark.vm({mark})
def test_with_a_machine_{number}(vm):
    assert vm.exec("uname -s").stdout.strip() == "Linux"
    assert vm.exec(["systemctl", "is-active", "web"]).ok
"""


def write_suite(folder: Path) -> None:
    below = ['"debian-12"'] * 6 + [f"layer_{number}" for number in range(LAYERS - 6)]
    layers = [LAYER.format(below=each, number=number) for number, each in enumerate(below)]
    (folder / "conftest.py").write_text("from pytest_vmbottle import layer\n" + "".join(layers))
    for file in range(FILES):
        text = "import pytest\n"
        for number in range(TESTS):
            mark = f'"layer_{(file + number) % LAYERS}"' if file % 4 else f'"debian-12", memory="{1 + number % 3}G"'
            text += (WITH_MACHINE if number % 5 else PLAIN).format(mark=mark, number=number)
        (folder / f"test_{file}.py").write_text(text)


def seconds(argv: list[str], folder: Path) -> float:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "VMBOTTLE_CATALOG": str(folder / "catalog")}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *argv], cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how long the plan of a large suite takes.")
    parser.add_argument("-n", "--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    calls = {
        "vmbottle ci plan": ["pytest_vmbottle", "ci", "plan", "--shards", "8"],
        "pytest --collect-only, without the plugin": ["pytest", "--collect-only", "-qq", "-p", "no:vmbottle", "-p", "no:cacheprovider"],
    }
    with tempfile.TemporaryDirectory(prefix="vmbottle-plan-") as name:
        folder = Path(name)
        write_suite(folder)
        found = {what: [seconds(argv, folder) for _ in range(rounds)] for what, argv in calls.items()}
    for what, each in found.items():
        print(f"{what}: {min(each):.1f} s")
    sys.exit(min(found["vmbottle ci plan"]) > MOST_SECONDS)


if __name__ == "__main__":
    main()
