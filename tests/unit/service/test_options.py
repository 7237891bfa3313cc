"""Options of the service: who may be told the token, and which tokens there may be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pytest_vmbottle import SpecError
from pytest_vmbottle.service.options import Options, is_loopback, made_token, read_token
from tests.unit.service.asgi import TOKEN


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("text", [TOKEN, "Zk3_x-9~T.b+Qr7mWv5LpA", "b" * 16 + TOKEN])
def test_a_token_of_128_bits_is_read_without_its_line_end(tmp_path: Path, text: str) -> None:
    assert read_token(written(tmp_path / "token", f"{text}\n")) == text


@pytest.mark.parametrize(
    "text", ["", TOKEN[:31], "a" * 64, "Zk3_x-9~T.b+Qr7mWv5L", "two words " + TOKEN, f"{TOKEN}\n{TOKEN}", TOKEN + "=", "ü" * 40]
)
def test_a_token_that_can_be_guessed_or_cannot_be_sent_is_refused_with_a_command_that_makes_one(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match="openssl rand -hex 32"):
        read_token(written(tmp_path / "token", text))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_token_that_others_can_read_or_replace_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SpecError, match="chmod 600"):
        read_token(written(tmp_path / "token", TOKEN, mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_token_of_another_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "token", TOKEN)
    os.chown(path, 65534, 65534)

    with pytest.raises(SpecError, match="others"):
        read_token(path)


def test_what_is_no_file_is_no_token(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Is a directory"):
        read_token(tmp_path)


def test_the_catalogs_own_token_is_made_once_and_for_its_user_only(tmp_path: Path) -> None:
    path = made_token(tmp_path / "catalog")
    token = read_token(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 64
    assert read_token(made_token(tmp_path / "catalog")) == token


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("a.localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("localhost.example.org", False), ("", False)),
    ],
)
def test_loopback_is_this_computer_alone(host: str, *, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_elsewhere_than_on_loopback_it_takes_tls_here_or_at_a_proxy(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--tls-cert"):
        Options(root=tmp_path, token=TOKEN, host="0.0.0.0")

    assert Options(root=tmp_path, token=TOKEN, host="0.0.0.0", behind_proxy=True).behind_proxy
    assert Options(root=tmp_path, token=TOKEN, host="0.0.0.0", certificate=tmp_path / "cert.pem").certificate


def test_a_key_without_a_certificate_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--tls-cert"):
        Options(root=tmp_path, token=TOKEN, key=tmp_path / "key.pem")


def test_the_options_do_not_show_the_token(tmp_path: Path) -> None:
    assert TOKEN not in repr(Options(root=tmp_path, token=TOKEN))
