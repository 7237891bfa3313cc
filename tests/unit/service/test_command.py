"""`vmbottle serve` before it serves: what it refuses, and how it says so."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle.cli import main
from pytest_vmbottle.cli import serve as module
from tests.unit.service.asgi import TOKEN


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(TOKEN)
    return path


def serve(tmp_path: Path, *words: str | Path, **env: str) -> Result:
    return CliRunner().invoke(main, ["--catalog", str(tmp_path / "catalog"), "serve", *map(str, words)], env=env)


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "uvicorn" else name)
    refused = serve(tmp_path)

    assert refused.exit_code == 3
    assert "uvicorn is not installed" in refused.output
    assert "pip install 'pytest-vmbottle[serve]'" in refused.output


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_computers_reach_it_only_with_a_token_and_tls(tmp_path: Path, token: Path, host: str) -> None:
    without = serve(tmp_path, "--host", host, "--behind-proxy")
    plain = serve(tmp_path, "--host", host, "--token-file", token)

    assert (without.exit_code, plain.exit_code) == (2, 2)
    assert "--token-file" in without.output
    assert "--tls-cert" in plain.output
    assert not (tmp_path / "catalog").exists()


def test_a_token_that_others_can_read_is_refused(tmp_path: Path, token: Path) -> None:
    token.chmod(0o644)
    refused = serve(tmp_path, VMBOTTLE_SERVE_TOKEN_FILE=str(token))

    assert refused.exit_code == 2
    assert "chmod 600" in refused.output
    assert TOKEN not in refused.output


def test_a_token_file_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    refused = serve(tmp_path, "--token-file", tmp_path / "none")

    assert refused.exit_code == 1
    assert "No such file" in refused.output


def test_a_certificate_that_is_none_is_told_by_its_option(tmp_path: Path, token: Path) -> None:
    refused = serve(tmp_path, "--token-file", token, "--tls-cert", token)

    assert refused.exit_code == 2
    assert f"--tls-cert {token}" in refused.output


def test_a_port_that_is_taken_is_told_with_the_address(tmp_path: Path, token: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = serve(tmp_path, "--token-file", token, VMBOTTLE_SERVE_PORT=str(port))

    assert refused.exit_code == 1
    assert f"127.0.0.1:{port}: Address already in use" in refused.output


def test_a_setting_that_is_wrong_is_told_before_anything_is_served(tmp_path: Path, token: Path) -> None:
    refused = serve(tmp_path, "--token-file", token, "--timeout-factor", "-1")

    assert refused.exit_code == 2
    assert "--timeout-factor" in refused.output


def test_every_option_has_a_variable_and_the_documentation_names_both() -> None:
    page = (Path(__file__).parents[3] / "docs" / "service.md").read_text()
    own = [each for each in module.serve.params if str(each.envvar or "").startswith("VMBOTTLE_SERVE_")]

    assert len(own) >= 11
    assert [each.opts[0] for each in own if f"`{each.opts[0]}`" not in page] == []
    assert [each.envvar for each in own if f"`{each.envvar}`" not in page and each.opts[0] != "--tls-key"] == []
