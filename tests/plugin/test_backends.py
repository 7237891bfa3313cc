"""What a backend cannot do is known before anything runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

CONFTEST = """
    from pytest_vmbottle.testing import FakeBackend

    class Small(FakeBackend):
        def unsupported_reason(self, spec):
            return "display=True: these machines have no screen" if spec.display else None

    def pytest_vmbottle_make_backend(config, name):
        return Small() if name == "small" else None
"""
TESTS = """
    import pathlib, pytest

    disk = pathlib.Path(__file__).with_name("disk.raw")
    disk.write_bytes(bytes(510) + b"\\x55\\xaa" + bytes((1 << 20) - 512))

    @pytest.mark.vm(disk, display=True)
    def test_screen(vm):
        pass

    @pytest.mark.vm(disk)
    def test_command(vm):
        assert vm.exec(["true"]).ok
"""


@pytest.fixture
def run(pytester: pytest.Pytester, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pytest.RunResult]:
    """Runs two tests on a backend without screens."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    catalog = tmp_path_factory.mktemp("catalog")

    def call(*words: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess("--vm-backend=small", f"--vm-catalog={catalog}", "-rs", *words)

    return call


def test_a_test_that_the_backend_cannot_do_is_skipped_at_collection_with_the_reason(run: Callable[..., pytest.RunResult]) -> None:
    result = run("--vm-missing=skip")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["vmbottle: 1 test*: display=True*"])
    assert "SKIPPED" in result.stdout.str()


def test_where_nothing_may_be_missing_it_is_an_error_with_the_same_reason(run: Callable[..., pytest.RunResult]) -> None:
    result = run("--vm-missing=fail")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["vmbottle: 1 test*: display=True*", "*BackendUnavailable: display=True*"])


def test_what_names_stand_for_has_to_be_said_with_an_equals_sign(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nvm_smolvm_images = debian-12")
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--vm-smolvm-images: 'debian-12'" in result.stdout.str() + result.stderr.str()


def test_qemu_refuses_a_list_of_networks_in_a_sentence(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.vm('debian-12', network=['10.0.0.0/8'])\ndef test_it(vm): pass")
    result = pytester.runpytest_inprocess("--vm-missing=skip", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*network*"])
