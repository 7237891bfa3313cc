"""Archives are signed, and believed, as the real minisign does it."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
from click.testing import CliRunner

from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main, travel
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.travel.minisign import PublicKey, SecretKey, signature_of
from pytest_vmbottle.travel.packs import Importer
from tests.unit.travel.conftest import Home, quiet


def minisign(*words: str | Path, answers: str = "") -> str:
    # With little memory, it makes keys whose password takes little: else each one takes 1 GiB, and seconds.
    ended = subprocess.run(
        ["prlimit", f"--as={100 << 20}", "minisign", *words], input=answers, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return ended.stdout


@attrs.frozen
class Pair:
    """Keys that minisign made."""

    public: Path
    secret: Path

    @classmethod
    def make(cls, folder: Path, name: str, *words: str, answers: str = "") -> Pair:
        pair = cls(folder / f"{name}.pub", folder / f"{name}.key")
        minisign("-G", *words, "-p", pair.public, "-s", pair.secret, answers=answers)
        return pair

    def sign(self, path: Path, *words: str) -> None:
        minisign("-S", "-s", self.secret, "-m", path, *words)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("keys"), "packs", "-W")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.make(tmp_path_factory.mktemp("keys"), "others", "-W")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "web.vmpack"
    path.write_bytes(os.urandom(3_000_000))
    return path


def no_password() -> str:
    raise AssertionError("there is none")


def checked(public: str | Path, path: Path) -> str:
    with path.open("rb") as opened:
        return PublicKey.read(str(public)).check(opened, path)


# -- both directions -----------------------------------------------------------------------------------------------------------------


def test_minisign_believes_what_was_signed_here(keys: Pair, file: Path) -> None:
    where = SecretKey.read(keys.secret, no_password).sign(file)
    assert where == signature_of(file)
    told = minisign("-V", "-H", "-p", keys.public, "-m", file)
    assert told.startswith("Signature and comment signature verified\nTrusted comment: timestamp:")
    assert told.endswith("\tfile:web.vmpack\thashed\n")
    assert checked(keys.public, file) == told.partition("Trusted comment: ")[2].strip()


def test_a_files_name_stays_on_the_one_line_of_the_comment(keys: Pair, tmp_path: Path) -> None:
    file = tmp_path / "a\x1b\nf\udcffle"
    file.write_bytes(b"content")
    SecretKey.read(keys.secret, no_password).sign(file)
    assert "\tfile:a\\x1b f\\udcffle\thashed" in minisign("-V", "-p", keys.public, "-m", file)
    checked(keys.public, file)


def test_what_minisign_signed_is_believed_here(keys: Pair, file: Path) -> None:
    keys.sign(file, "-t", "of the main branch")
    key = keys.public.read_text().splitlines()[1]
    assert checked(keys.public, file) == checked(key, file) == "of the main branch"
    assert f"minisign public key {PublicKey.read(key).name}" in keys.public.read_text()


def test_a_secret_key_with_a_password_signs_for_who_knows_it(tmp_path: Path, file: Path) -> None:
    pair = Pair.make(tmp_path, "locked", answers="let me\nlet me\n")
    SecretKey.read(pair.secret, lambda: "let me").sign(file)
    minisign("-V", "-p", pair.public, "-m", file)
    with pytest.raises(CatalogError, match="the password is wrong"):
        SecretKey.read(pair.secret, lambda: "let you")


# -- what is refused -----------------------------------------------------------------------------------------------------------------


def changed(path: Path, line: int, change: Callable[[bytes], bytes]) -> None:
    lines = path.read_bytes().splitlines()
    lines[line] = change(lines[line])
    path.write_bytes(b"\n".join(lines) + b"\n")


def flipped(at: int) -> Callable[[bytes], bytes]:
    def flip(line: bytes) -> bytes:
        raw = bytearray(base64.b64decode(line))
        raw[at] ^= 1
        return base64.b64encode(raw)

    return flip


@pytest.mark.parametrize(
    ("line", "change", "told"),
    [
        (1, flipped(40), "not the file that was signed"),
        (1, flipped(5), "was signed with the key"),
        (1, flipped(1), "no signature of minisign"),
        (1, lambda line: line[:-8], "no signature of minisign"),
        (1, lambda _: b"\xff", "no signature of minisign"),
        (2, lambda line: line + b" and more", "trusted comment is not the one"),
        (2, lambda line: line.replace(b"trusted", b"other"), "no signature of minisign"),
        (3, flipped(0), "trusted comment is not the one"),
        (3, lambda line: line + b"\nmore", "no signature of minisign"),
        (3, lambda _: b"", "no signature of minisign"),
    ],
)
def test_a_signature_that_was_changed_is_refused(keys: Pair, file: Path, line: int, change: Callable[[bytes], bytes], told: str) -> None:
    SecretKey.read(keys.secret, no_password).sign(file)
    changed(signature_of(file), line, change)
    with pytest.raises(CatalogError, match=told):
        checked(keys.public, file)


def test_a_file_that_is_not_signed_or_has_changed_is_refused(keys: Pair, file: Path) -> None:
    with pytest.raises(CatalogError, match=r"is not signed: .*\.minisig.*No such file"):
        checked(keys.public, file)
    keys.sign(file)
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(CatalogError, match="not the file that was signed"):
        checked(keys.public, file)


def test_a_signature_of_another_key_is_refused_whatever_number_it_claims(keys: Pair, others: Pair, file: Path) -> None:
    others.sign(file)
    ours, theirs = (PublicKey.read(str(pair.public)) for pair in (keys, others))
    with pytest.raises(CatalogError, match=f"with the key {theirs.name}, and not with {ours.name}"):
        checked(keys.public, file)
    changed(signature_of(file), 1, lambda line: base64.b64encode(b"ED" + ours.number + base64.b64decode(line)[10:]))
    with pytest.raises(CatalogError, match="not the file that was signed"):
        checked(keys.public, file)


def test_a_signature_of_the_whole_content_is_told_to_be_made_anew(keys: Pair, file: Path) -> None:
    keys.sign(file, "-l")
    with pytest.raises(CatalogError, match="sign the file again, with -H"):
        checked(keys.public, file)


@pytest.mark.parametrize(
    "content", ["", "no key", "RW", "untrusted comment: x\n", "RUQRe2Hqf2WIkpbzao6FEVqDcMDGbyrCt1W2XYMkHml+mjPxhkSCVYbp", "\udcff"]
)
def test_what_is_no_key_is_told(content: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="neither a public key of minisign"):
        PublicKey.read(content)
    path = tmp_path / "key"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(CatalogError, match="neither a public key of minisign"):
        PublicKey.read(str(path))
    with pytest.raises(CatalogError, match="no secret key of minisign"):
        SecretKey.read(path, no_password)


@pytest.mark.parametrize(
    ("at", "value", "told"), [(0, b"Xd", "no secret key"), (2, b"Xx", "no secret key"), (100, b"\1", "damaged"), (2, b"Sc", "password")]
)
def test_a_damaged_secret_key_is_told(keys: Pair, tmp_path: Path, at: int, value: bytes, told: str) -> None:
    raw = bytearray(base64.b64decode(keys.secret.read_text().splitlines()[1]))
    raw[at : at + len(value)] = value
    path = tmp_path / "damaged"
    path.write_bytes(b"untrusted comment: key\n" + base64.b64encode(raw))
    with pytest.raises(CatalogError, match=told):
        SecretKey.read(path, lambda: "")


@pytest.mark.parametrize("limits", [bytes(16), b"\xff" * 16, b"\0" * 8 + b"\xff" * 8])
def test_a_secret_key_that_wants_any_effort_ends_in_a_sentence(keys: Pair, tmp_path: Path, limits: bytes) -> None:
    raw = bytearray(base64.b64decode(keys.secret.read_text().splitlines()[1]))
    raw[2:4], raw[38:54] = b"Sc", limits
    path = tmp_path / "damaged"
    path.write_bytes(base64.b64encode(raw))
    with pytest.raises(CatalogError, match="password"):
        SecretKey.read(path, lambda: "")


# -- imports -------------------------------------------------------------------------------------------------------------------------


def test_an_archive_is_imported_only_if_it_is_signed_with_the_key(
    home: Home, elsewhere: Catalog, tmp_path: Path, keys: Pair, others: Pair
) -> None:
    lines: list[str] = []
    importer = Importer(catalog=elsewhere, fingerprint=lambda _: "a computer", say=lines.append)
    file = home.export(tmp_path / "web.vmpack")
    key = PublicKey.read(str(keys.public))

    def refuse(told: str) -> None:
        with pytest.raises(CatalogError, match=told):
            importer.read(file, key)
        assert not lines
        assert not list(elsewhere.packs.glob("*"))
        assert not ImageStore(elsewhere.images).list()

    refuse("is not signed")
    others.sign(file)
    refuse("and not with")
    keys.sign(file)
    changed(signature_of(file), 2, lambda line: line.replace(b"web.vmpack", b"other.vmpack"))
    refuse("trusted comment")
    keys.sign(home.export(file, pack=home.base))
    home.export(file)
    refuse("not the file that was signed")
    keys.sign(file, "-t", "of the main branch")
    assert len(importer.read(file, key)) == 2
    assert lines[0] == f"signed with the key {key.name}: of the main branch"


def test_a_file_that_takes_the_name_of_the_one_that_was_checked_is_not_read(
    home: Home, elsewhere: Catalog, tmp_path: Path, keys: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = home.export(tmp_path / "web.vmpack", pack=home.base), home.export(tmp_path / "other.vmpack")
    keys.sign(file)
    check = PublicKey.check

    def checked_and_replaced(self: PublicKey, opened: BufferedReader, path: Path) -> str:
        comment = check(self, opened, path)
        other.replace(path)
        return comment

    monkeypatch.setattr(PublicKey, "check", checked_and_replaced)
    importer = Importer(catalog=elsewhere, fingerprint=lambda _: "a computer", say=quiet)
    assert [pack.key for pack in importer.read(file, PublicKey.read(str(keys.public)))] == [home.base.key]


# -- by hand -------------------------------------------------------------------------------------------------------------------------


def test_the_commands_sign_and_refuse_what_is_not_signed(
    home: Home, tmp_path: Path, keys: Pair, others: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(travel, "qemu_backend", lambda *_: SimpleNamespace(fingerprint=lambda _: "a computer"))
    elsewhere, file = tmp_path / "elsewhere", tmp_path / "web.vmpack"

    def run(root: Path, *words: str | Path, status: int = 0) -> str:
        ended = CliRunner().invoke(main, ["--catalog", str(root), "pack", *map(str, words)])
        assert ended.exit_code == status, ended.output
        return ended.stderr

    told = run(home.catalog.root, "export", home.layer.key, "-o", file, "--sign", keys.secret)
    assert told.endswith(f"signed: {file}.minisig\n")
    run(elsewhere, "import", file, "--public-key", others.public, status=1)
    run(elsewhere, "import", file, "--public-key", "", status=1)
    monkeypatch.setenv("VMBOTTLE_PUBLIC_KEY", str(others.public))
    assert "was signed with the key" in run(elsewhere, "import", file, status=1)
    assert "file:web.vmpack" in run(elsewhere, "import", file, "--public-key", keys.public)
    assert "is there already" in run(elsewhere, "import", file, "--public-key", keys.public)


def test_a_password_is_asked_for_at_the_terminal_before_anything_else(tmp_path: Path) -> None:
    pair = Pair.make(tmp_path, "locked", answers="let me\nlet me\n")
    words = ["--catalog", tmp_path / "catalog", "pack", "export", "0123", "-o", tmp_path / "file", "--sign", pair.secret]
    argv = [sys.executable, "-m", "pytest_vmbottle", *map(str, words)]

    def told(typed: bytes) -> str:
        ours, its = os.openpty()
        # In a session of its own, it has no other terminal than this one.
        with subprocess.Popen(argv, stdin=its, stdout=subprocess.PIPE, stderr=its, start_new_session=True) as command:
            os.close(its)
            screen = b""
            try:
                while chunk := os.read(ours, 4096):
                    screen += chunk
                    if screen.endswith(b": ") and typed:
                        os.write(ours, typed)
                        typed = b""
            except OSError:  # the command has ended
                pass
            finally:
                os.close(ours)
        assert command.returncode == 1
        return screen.decode()

    assert "the password is wrong" in told(b"let you\n")
    asked = told(b"let me\n")
    assert asked.startswith(f"Password of {pair.secret}: ")
    assert "let me" not in asked
    assert "no pack" in asked
    ended = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, "no terminal to ask for it" in ended.stderr) == (1, True)
