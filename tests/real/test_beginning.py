"""The first five minutes: what `vmbottle init` writes passes, on a real machine, as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_the_first_tests_pass_as_they_were_written(inner: pytest.Pytester) -> None:
    subprocess.run([sys.executable, "-m", "pytest_vmbottle", "init"], cwd=inner.path, check=True, capture_output=True)
    result = inner.runpytest_subprocess("-p", "no:cacheprovider", "--vm-missing=fail", "--strict-markers", "--strict-config", "tests")
    result.assert_outcomes(passed=3)
