"""Pulling into the store: what is pinned, what is kept, what never gets there; by the functions and by the command."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle.cli import main
from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import ImageStore, PullOptions, Traits, download, pull, pull_url, puller

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import Proxy, Web

FOLDER = "/images/cloud/bookworm/latest"
FILE = f"debian-12-genericcloud-{ {'x86_64': 'amd64', 'aarch64': 'arm64'}[host_arch()] }.qcow2"
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pytest_vmbottle.cli import main
main(prog_name="vmbottle")
"""


def disk(fill: bytes = b"", size: int = 1 << 20) -> bytes:
    """A small disk with a partition table's signature."""
    content = bytearray(size)
    content[510:512] = b"\x55\xaa"
    content[4096 : 4096 + len(fill)] = fill
    return bytes(content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before a transfer is taken up again."""
    monkeypatch.setattr(download, "_PAUSE", 0.0)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalog that the command uses."""
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(tmp_path / "catalog"))
    return tmp_path / "catalog"


@pytest.fixture
def debian(proxy: Proxy, web: Web) -> Web:
    """The web server, under the names of Debian's servers and of all others."""
    assert proxy.target == web.server_port
    return web


@pytest.fixture
def store(root: Path) -> ImageStore:
    return ImageStore(root / "images")


def publish(web: Web, content: bytes) -> None:
    """Has the servers of Debian publish this disk."""
    web.files[f"{FOLDER}/{FILE}"] = content
    web.files[f"{FOLDER}/SHA512SUMS"] = f"{'0' * 128}  other.qcow2\n{hashlib.sha512(content).hexdigest()}  {FILE}\n".encode()


def left(store: ImageStore) -> list[str]:
    """Return all files of a store that belong to no named image."""
    named = {image.disk.parent for image in store.list()}
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file() and path.parent not in named)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="vmbottle")


# -- official images ---------------------------------------------------------------------------------------------------------------------


def test_an_official_image_is_downloaded_once_and_then_only_its_checksum_is_asked_for(proxy: Proxy, debian: Web, store: ImageStore) -> None:
    publish(debian, disk(b"one"))
    said: list[str] = []
    first = pull(store, "debian-12", options=PullOptions(progress=said.append))
    assert f"https://cloud.debian.org{FOLDER}/{FILE}" in said[0]
    again = pull(store, "debian-12", options=PullOptions(progress=said.append, update=True))
    assert again == first == store.get("debian-12")
    assert "debian-12" in said[-1]
    assert debian.paths == [f"{FOLDER}/SHA512SUMS", f"{FOLDER}/{FILE}", f"{FOLDER}/SHA512SUMS"]
    assert left(store) == ["names/debian-12.json"]
    assert proxy.hosts == ["cloud.debian.org"] * 3


def test_another_content_under_the_same_name_is_said_and_taken_with_update(debian: Web, store: ImageStore) -> None:
    publish(debian, disk(b"one"))
    first = pull(store, "debian-12")
    publish(debian, disk(b"two"))
    with pytest.raises(CatalogError, match="--update"):
        pull(store, "debian-12")
    assert store.get("debian-12") == first
    assert debian.paths.count(f"{FOLDER}/{FILE}") == 1
    second = pull(store, "debian-12", options=PullOptions(update=True))
    assert (second, second.sha256) == (store.get("debian-12"), sha256(disk(b"two")))
    assert not first.disk.exists()


def test_an_image_that_was_built_here_is_not_taken_for_the_official_one(debian: Web, store: ImageStore, tmp_path: Path) -> None:
    publish(debian, disk(b"official"))
    (tmp_path / "built").write_bytes(disk(b"built"))
    built = store.add(tmp_path / "built", name="debian-12", traits=Traits(prepared=True))
    with pytest.raises(CatalogError, match="--name"):
        pull(store, "debian-12")
    pulled = pull(store, "debian-12", name="debian-12-cloud")
    assert (store.get("debian-12"), store.get("debian-12-cloud")) == (built, pulled)


def test_the_same_disk_that_was_added_by_hand_is_not_downloaded_but_known_better(debian: Web, store: ImageStore, tmp_path: Path) -> None:
    publish(debian, disk())
    (tmp_path / "copy").write_bytes(disk())
    store.add(tmp_path / "copy", name="debian-12")
    assert pull(store, "debian-12").user == "debian"
    assert f"{FOLDER}/{FILE}" not in debian.paths


def test_a_damaged_image_is_downloaded_again(debian: Web, store: ImageStore) -> None:
    publish(debian, disk())
    image = pull(store, "debian-12")
    image.disk.unlink()
    with pytest.raises(CatalogError, match="debian-12"):
        store.get("debian-12")
    assert pull(store, "debian-12").disk.read_bytes() == disk()


@pytest.mark.parametrize(
    ("path", "way", "reason"),
    [
        ("SHA512SUMS", "status 404", "404"),
        ("SHA512SUMS", "html", "web page"),
        ("SHA512SUMS", "redirect http://cloud.debian.org/x", "http://cloud.debian.org/x"),
        ("SHA512SUMS", "endless", "1.0 MiB"),
        (FILE, "status 404", "404"),
        (FILE, "html", "web page"),
        (FILE, "redirect http://cloud.debian.org/x", "http://cloud.debian.org/x"),
        (FILE, f"length {1 << 45}", "8.0 GiB"),
        (FILE, "cut 0.5", "debian-12"),
    ],
)
def test_no_fault_of_a_server_leaves_anything_under_a_name(debian: Web, store: ImageStore, path: str, way: str, reason: str) -> None:
    publish(debian, disk())
    debian.answers[f"{FOLDER}/{path}"] = [way]
    with pytest.raises(CatalogError, match=reason):
        pull(store, "debian-12")
    assert store.names() == ()
    assert not list(store.root.glob("sha256/*"))


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (f"{'0' * 128}  other.qcow2\n", FILE),
        (f"{'0' * 64}  {FILE}\n", FILE),
        (f"{'0' * 128}  {FILE}\n{'1' * 128}  {FILE}\n", "2 different"),
        ("not a list", "sha512"),
    ],
)
def test_a_checksum_file_that_does_not_tell_the_checksum_is_refused_before_the_download(
    debian: Web, store: ImageStore, sums: str, reason: str
) -> None:
    publish(debian, disk())
    debian.files[f"{FOLDER}/SHA512SUMS"] = sums.encode()
    with pytest.raises(CatalogError, match=reason):
        pull(store, "debian-12")
    assert debian.paths == [f"{FOLDER}/SHA512SUMS"]


def test_what_has_another_checksum_is_thrown_away(debian: Web, store: ImageStore) -> None:
    publish(debian, disk())
    debian.files[f"{FOLDER}/{FILE}"] = disk(b"forged")
    with pytest.raises(CatalogError, match=hashlib.sha512(disk(b"forged")).hexdigest()):
        pull(store, "debian-12")
    assert (store.names(), left(store)) == ((), [])


def test_a_foreign_architecture_has_a_name_and_a_file_of_its_own(debian: Web, store: ImageStore) -> None:
    foreign, word = {"x86_64": ("aarch64", "arm64")}.get(host_arch(), ("x86_64", "amd64"))
    file = f"debian-12-genericcloud-{word}.qcow2"
    debian.files[f"{FOLDER}/{file}"] = disk(b"foreign")
    debian.files[f"{FOLDER}/SHA512SUMS"] = f"{hashlib.sha512(disk(b'foreign')).hexdigest()}  {file}\n".encode()
    assert pull(store, "debian-12", arch=foreign).name == f"debian-12-{foreign}"


def test_an_architecture_that_is_not_published_is_refused(store: ImageStore) -> None:
    with pytest.raises(CatalogError, match="s390x"):
        pull(store, "debian-12", arch="s390x")


def test_an_unknown_image_is_guessed_at(store: ImageStore) -> None:
    with pytest.raises(CatalogError, match="'debian-12'"):
        pull(store, "debain-12")
    assert not store.root.exists()


def test_offline_takes_what_is_there_and_asks_nobody(proxy: Proxy, debian: Web, store: ImageStore) -> None:
    with pytest.raises(CatalogError, match="--offline"):
        pull(store, "debian-12", options=PullOptions(offline=True))
    publish(debian, disk())
    first = pull(store, "debian-12")
    asked = len(proxy.hosts)
    assert pull(store, "debian-12", options=PullOptions(offline=True)) == first
    assert len(proxy.hosts) == asked


# -- images from URLs --------------------------------------------------------------------------------------------------------------------


def test_a_disk_is_pulled_by_url_and_digest_and_then_nobody_is_asked(web: Web, store: ImageStore) -> None:
    web.files["/x.raw"] = disk()
    traits = Traits(firmware="uefi", user="admin", readiness="channel")
    first = pull_url(store, f"{web.url}/x.raw", sha256="SHA256:" + sha256(disk()).upper(), name="mine", arch="aarch64", traits=traits)
    assert (first.traits, first.arch, first.description) == (traits, "aarch64", f"from {web.url}/x.raw")
    again = pull_url(store, f"{web.url}/x.raw", sha256=sha256(disk()), name="mine", arch="aarch64", traits=traits)
    assert again == first == store.get("mine")
    assert web.paths == ["/x.raw"]


def test_other_traits_of_the_same_disk_cost_no_download(web: Web, store: ImageStore) -> None:
    web.files["/x.raw"] = disk()
    pull_url(store, f"{web.url}/x.raw", sha256=sha256(disk()), name="mine")
    assert pull_url(store, f"{web.url}/x.raw", sha256=sha256(disk()), name="mine", traits=Traits(user="admin")).user == "admin"
    assert web.paths == ["/x.raw"]


def test_offline_a_disk_by_url_must_be_the_one_that_is_there(web: Web, store: ImageStore) -> None:
    web.files["/x.raw"] = disk()
    first = pull_url(store, f"{web.url}/x.raw", sha256=sha256(disk()), name="mine")
    offline = PullOptions(offline=True)
    assert pull_url(store, f"{web.url}/x.raw", sha256=sha256(disk()), name="mine", options=offline) == first
    with pytest.raises(CatalogError, match="--offline"):
        pull_url(store, f"{web.url}/x.raw", sha256="0" * 64, name="mine", options=offline)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"url": "http://localhost/x"}, "https"),
        ({"url": "https://localhost/x.qcow2.xz"}, r"\.xz"),
        ({"sha256": "abc"}, "'abc'"),
        ({"name": "../x"}, "'../x'"),
    ],
)
def test_what_cannot_be_pulled_is_refused_before_anybody_is_asked(store: ImageStore, changes: dict[str, str], reason: str) -> None:
    given = {"url": "https://localhost/x", "sha256": "0" * 64, "name": "mine"} | changes
    with pytest.raises(CatalogError, match=reason):
        pull_url(store, given["url"], sha256=given["sha256"], name=given["name"])
    assert not store.root.exists()


def backed() -> bytes:
    """A qcow2 that would have QEMU open another file."""
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, 11, 16, 8 << 30, 0, 16, 3 << 16, 1 << 16, 1, 0, 0)
    return head + b"/etc/shadow" + bytes(1 << 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (backed(), "backing file"),
        (b"\xfd7zXZ\0" + bytes(1 << 20), "xz"),
        (b"", "https://localhost"),
    ],
)
def test_what_has_the_right_digest_and_is_no_safe_disk_is_thrown_away(web: Web, store: ImageStore, content: bytes, reason: str) -> None:
    web.files["/x"] = content
    with pytest.raises(CatalogError, match=reason) as caught:
        pull_url(store, f"{web.url}/x", sha256=sha256(content), name="mine")
    assert str(store.root) not in str(caught.value)
    assert (store.names(), left(store)) == ((), [])


def test_an_interrupted_pull_goes_on_under_any_name_that_wants_the_same(web: Web, store: ImageStore) -> None:
    web.files["/x"] = disk()
    web.answers["/x"] = ["cut 0.5"] * 4 + ["status 404", "serve"]
    with pytest.raises(CatalogError, match="404"):
        pull_url(store, f"{web.url}/x", sha256=sha256(disk()), name="mine")
    said: list[str] = []
    assert pull_url(store, f"{web.url}/x", sha256=sha256(disk()), name="other", options=PullOptions(progress=said.append)).name == "other"
    assert "960 KiB" in said[0]
    assert web.asked[-1][2]["Range"] == "bytes=983040-"
    assert left(store) == ["names/other.json"]


def test_a_download_that_could_not_be_added_is_not_downloaded_again(web: Web, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["/x"] = disk()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ImageStore, "add", full)
        with pytest.raises(CatalogError, match="space"):
            pull_url(store, f"{web.url}/x", sha256=sha256(disk()), name="mine")
    asked = len(web.asked)

    assert pull_url(store, f"{web.url}/x", sha256=sha256(disk()), name="mine").name == "mine"
    assert web.asked[asked][2]["Range"] == f"bytes={len(disk())}-"
    assert left(store) == ["names/mine.json"]


def test_a_server_that_calls_every_content_the_same_is_seen_through(web: Web, store: ImageStore) -> None:
    web.files["/x"] = disk(b"old")
    web.answers["/x"] = ['same "1"']
    with pytest.raises(CatalogError, match="sha256"):
        pull_url(store, f"{web.url}/x", sha256=sha256(disk()), name="mine")
    part = store.root / "downloads" / f"sha256-{sha256(disk())}"
    part.write_bytes(disk(b"old")[: 1 << 19])
    part.with_name(f"{part.name}.json").write_text(json.dumps({"validator": '"1"'}))
    web.files["/x"] = disk()
    pulled = pull_url(store, f"{web.url}/x", sha256=sha256(disk()), name="mine")
    assert pulled.disk.read_bytes() == disk()
    assert [headers.get("Range") for _, _, headers in web.asked] == [None, "bytes=524288-", None]


def test_a_body_without_end_is_left_at_the_limit(web: Web, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puller, "_MAX_SIZE", 1 << 20)
    web.answers["/x"] = ["endless"]
    with pytest.raises(CatalogError, match=r"1\.0 MiB"):
        pull_url(store, f"{web.url}/x", sha256="0" * 64, name="mine")
    assert sum(path.stat().st_size for path in (store.root / "downloads").iterdir()) < 1000


# -- the command -------------------------------------------------------------------------------------------------------------------------


def test_the_command_pulls_an_official_image_and_says_its_name_and_digest(debian: Web, root: Path) -> None:
    publish(debian, disk())
    result = run("image", "pull", "debian-12")
    assert (result.exit_code, result.stdout) == (0, f"debian-12 {sha256(disk())}\n"), result.output
    assert "https://cloud.debian.org/" in result.stderr
    (record,) = json.loads(run("image", "ls", "--json").stdout)
    assert (record["name"], record["user"], record["prepared"], record["description"]) == (
        "debian-12",
        "debian",
        False,
        "Debian 12 (bookworm) cloud image",
    )
    again = run("image", "pull", "debian-12", "--name", "debian-12")
    assert again.stdout == result.stdout
    assert run("image", "pull", "debian-12", "--offline").stdout == result.stdout
    assert (root / "images").stat().st_mode & 0o777 == 0o700


def test_the_command_pulls_a_url(web: Web, root: Path) -> None:
    web.files["/x"] = disk()
    result = run("image", "pull", f"{web.url}/x", "--sha256", sha256(disk()), "--name", "mine", "--user", "admin")
    assert (result.exit_code, result.stdout) == (0, f"mine {sha256(disk())}\n"), result.output
    image = ImageStore(root / "images").get("mine")
    assert image is not None
    assert image.user == "admin"


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (("debain-12",), 1, "'debian-12'"),
        (("debian-12", "--name", "../x"), 1, "'../x'"),
        (("http://localhost/x", "--sha256", "0" * 64, "--name", "mine"), 1, "https"),
        (("https://localhost/x", "--name", "mine"), 2, "--sha256"),
        (("https://localhost/x", "--sha256", "0" * 64), 2, "--name"),
        (("debian-12", "--sha256", "0" * 64), 2, "--sha256"),
        (("debian-12", "--user", "me", "--firmware", "uefi"), 2, "--firmware"),
        (("debian-12", "--arch", "s390x"), 2, "'s390x'"),
        (("debian-12", "--offline"), 1, "--offline"),
    ],
)
def test_a_pull_that_cannot_be_is_refused_with_what_to_do(root: Path, args: tuple[str, ...], status: int, words: str) -> None:
    result = run("image", "pull", *args)
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in " ".join(result.stderr.replace("│", "").split())
    assert not list(root.glob("images/names/*"))


def test_what_can_be_had_is_listed(root: Path) -> None:
    table = run("image", "ls", "--available").stdout
    assert "debian-12     build  Debian 12 (bookworm)\n" in table
    assert "debian-12     pull   Debian 12 (bookworm) cloud image\n" in table
    records = {record["name"]: record for record in json.loads(run("image", "ls", "--available", "--json").stdout)}
    assert (records["rocky-9"]["build"], records["rocky-9"]["pull"]) == (None, "Rocky Linux 9 cloud image")
    assert not root.joinpath("images").exists()


def started(*args: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", COMMAND, "image", "pull", *args]
    return subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_pulls_of_the_same_at_once_download_it_once(debian: Web, root: Path) -> None:
    publish(debian, disk())
    both = [started("debian-12") for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert {out for out, _ in told} == {f"debian-12 {sha256(disk())}\n"}
    assert debian.paths.count(f"{FOLDER}/{FILE}") == 1
    assert (root / "images" / "names" / "debian-12.json").exists()


def test_two_names_for_the_same_url_at_once_download_one_after_the_other(web: Web, root: Path) -> None:
    web.files["/x"] = disk()
    both = [started(f"{web.url}/x", "--sha256", sha256(disk()), "--name", name) for name in ("one", "two")]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert ImageStore(root / "images").names() == ("one", "two")
    assert left(ImageStore(root / "images")) == ["names/one.json", "names/two.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_pull_that_is_stopped_leaves_nothing_under_a_name_and_goes_on_later(web: Web, root: Path, number: signal.Signals) -> None:
    web.files["/x"] = disk()
    web.answers["/x"] = ["hang", "hang", "serve"]
    args = (f"{web.url}/x", "--sha256", sha256(disk()), "--name", "mine")
    process = started(*args)
    part = root / "images" / "downloads" / f"sha256-{sha256(disk())}"
    assert Deadline(60).poll(lambda: part.exists() and part.stat().st_size == 1 << 19)
    process.send_signal(number)
    out, words = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert (out, "Traceback" in words) == ("", False)
    assert ImageStore(root / "images").names() == ()
    web.answers.clear()
    result = run("image", "pull", *args)
    assert (result.exit_code, result.stdout) == (0, f"mine {sha256(disk())}\n"), result.output
    assert "512 KiB" in result.stderr
    assert web.asked[-1][2]["Range"] == f"bytes={1 << 19}-"


def test_on_a_terminal_progress_is_one_line_that_is_written_again_and_again(web: Web, root: Path) -> None:
    web.files["/x"] = disk()
    web.answers["/x"] = ["halt"]
    ours, theirs = os.openpty()
    argv = [sys.executable, "-c", COMMAND, "image", "pull", f"{web.url}/x", "--sha256", sha256(disk()), "--name", "mine"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    out, _ = process.communicate(timeout=120)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert (process.returncode, out.decode()) == (0, f"mine {sha256(disk())}\n")
    assert f"{web.url}/x\r\n" in shown
    assert re.search(r"\r\x1b\[K +\d %  \d+ KiB of 1\.0 MiB, \d+ KiB/s\r\x1b\[K 5\d %  5\d\d KiB of 1\.0 MiB", shown)
    assert shown.endswith("\r\n\r\x1b[K")
    assert (root / "images" / "names" / "mine.json").exists()
