"""Transfers from a loopback https server that has every fault an image server or a network can have."""

from __future__ import annotations

import fcntl
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.request import getproxies

import pytest

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.images import download
from pytest_vmbottle.images.download import Downloads, Partial, Transfer, check_url, fetch_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.unit.conftest import Authority, Proxy, Web

CONTENT = bytes(range(256)) * 4096


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[Partial]:
    """A file to fetch into, held."""
    with Downloads(tmp_path / "downloads").partial("x", deadline=Deadline(60), waiting=print) as partial:
        yield partial


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before a transfer is taken up again."""
    monkeypatch.setattr(download, "_PAUSE", 0.0)


def transfer(url: str, partial: Partial, *, max_size: int = 1 << 24, seconds: float = 60.0, lines: list[str] | None = None) -> Transfer:
    told = lines if lines is not None else []
    return Transfer(
        url=url, partial=partial, what="the image", max_size=max_size, deadline=Deadline(seconds), progress=told.append, every=0.0
    )


def refused(url: str, partial: Partial, *, max_size: int = 1 << 24, seconds: float = 60.0) -> str:
    with pytest.raises(CatalogError) as caught:
        transfer(url, partial, max_size=max_size, seconds=seconds).run()
    return str(caught.value)


def test_a_file_arrives_whole_and_progress_is_told_in_bytes_percent_and_speed(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    lines: list[str] = []
    transfer(f"{web.url}/x", partial, lines=lines).run()
    assert partial.path.read_bytes() == CONTENT
    assert lines
    assert all(re.fullmatch(r" *\d+ %  [\d.]+ [KM]iB of 1\.0 MiB, [\d.]+ [KM]iB/s", line) for line in lines)


def test_what_is_being_fetched_is_private(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.parent.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in partial.path.parent.iterdir()} == {0o600}


def test_a_transfer_that_breaks_off_goes_on_where_it_was(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["cut 0.5", "cut 0.5", "serve"]
    lines: list[str] = []
    transfer(f"{web.url}/x", partial, lines=lines).run()
    assert partial.path.read_bytes() == CONTENT
    assert [headers.get("Range") for _, _, headers in web.asked] == [None, "bytes=524288-", "bytes=786432-"]
    assert any("512 KiB" in line for line in lines)


def test_a_transfer_that_always_breaks_off_ends_with_what_to_do_and_the_next_one_goes_on(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["cut 0.5"]
    message = refused(f"{web.url}/x", partial)
    assert re.search(r"\d+ KiB", message)
    assert len(web.asked) == 5
    web.answers.clear()
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT
    assert web.asked[-1][2]["Range"] == f"bytes={len(CONTENT) - (len(CONTENT) >> 5)}-"


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["cut 0.5", "whole"]
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT
    assert "Range" in web.asked[-1][2]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(web: Web, partial: Partial) -> None:
    web.files["/x"] = bytes(len(CONTENT))
    web.answers["/x"] = ["cut 0.5", "status 404"]
    refused(f"{web.url}/x", partial)
    assert partial.size == len(CONTENT) // 2
    web.answers.clear()
    web.files["/x"] = CONTENT
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) // 4])
def test_a_file_that_was_all_there_or_became_shorter_is_not_asked_for_beyond_its_end(web: Web, partial: Partial, size: int) -> None:
    web.files["/x"] = CONTENT
    transfer(f"{web.url}/x", partial).run()
    web.files["/x"] = CONTENT[:size]
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT[:size]
    assert web.asked[1][2]["Range"] == f"bytes={len(CONTENT)}-"


def test_bytes_of_which_nobody_knows_what_they_are_of_are_fetched_again(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ['same "1"']
    partial.path.write_bytes(b"left behind")
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT


def test_an_answer_with_another_part_than_was_asked_for_is_refused(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["cut 0.5", "other_part"]
    refused(f"{web.url}/x", partial)
    assert [headers.get("Range") for _, _, headers in web.asked] == [None, "bytes=524288-"]


@pytest.mark.parametrize("number", [429, 503])
def test_a_server_that_is_busy_is_asked_again(web: Web, partial: Partial, number: int) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = [f"status {number}", "serve"]
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT


def test_a_network_that_goes_away_in_the_middle_is_waited_for_a_little(web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["cut 0.5", "serve"]
    networks = iter([getproxies(), {"https": "http://127.0.0.1:1"}, getproxies()])
    monkeypatch.setattr(download, "getproxies", lambda: next(networks))
    lines: list[str] = []
    transfer(f"{web.url}/x", partial, lines=lines).run()
    assert partial.path.read_bytes() == CONTENT
    assert any("refused" in line and "512 KiB" in line for line in lines)


def test_a_body_without_end_is_cut_at_the_limit_and_leaves_nothing(web: Web, partial: Partial) -> None:
    web.answers["/x"] = ["endless"]
    assert "1.0 MiB" in refused(f"{web.url}/x", partial, max_size=1 << 20)
    assert partial.size == 0


def test_a_file_that_says_that_it_is_too_large_is_not_even_begun(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    assert "512 KiB" in refused(f"{web.url}/x", partial, max_size=1 << 19)
    assert partial.size == 0


def test_a_file_for_which_there_is_no_room_is_not_even_begun(web: Web, partial: Partial) -> None:
    web.answers["/x"] = [f"length {1 << 50}"]
    assert "1024 TiB" in refused(f"{web.url}/x", partial, max_size=1 << 52)


@pytest.mark.timeout(60)
def test_a_server_that_falls_silent_is_left(web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_SILENT_SECONDS", 1.5)
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["silent", "serve"]
    lines: list[str] = []
    transfer(f"{web.url}/x", partial, lines=lines).run()
    assert partial.path.read_bytes() == CONTENT
    assert any("2 s" in line and "512 KiB" in line for line in lines)


@pytest.mark.timeout(60)
def test_a_server_that_only_drips_is_left_at_the_deadline(web: Web, partial: Partial) -> None:
    web.files["/x"] = CONTENT
    web.answers["/x"] = ["drip"]
    assert "1.0 MiB" in refused(f"{web.url}/x", partial, seconds=0.5)
    assert 0 < partial.size < len(CONTENT)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("answer", ["heads", "continue", "trailers"])
@pytest.mark.parametrize("proxied", [False, True])
def test_a_server_whose_answer_has_no_end_is_left_in_time(
    request: pytest.FixtureRequest, web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch, answer: str, *, proxied: bool
) -> None:
    monkeypatch.setattr(download, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(download, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(download, "_TEXT_SECONDS", 0.5)
    web.files["/x"] = CONTENT[:1000]
    web.answers["/x"] = [answer]
    if proxied:
        request.getfixturevalue("proxy")
    url = "https://cloud.debian.org/x" if proxied else f"{web.url}/x"
    assert ("cloud.debian.org" if proxied else "localhost") in refused(url, partial, seconds=0.5)
    with pytest.raises(CatalogError, match="the list"):
        fetch_text(url, what="the list")


@pytest.mark.timeout(60)
def test_a_proxy_whose_answer_has_no_end_is_left_in_time(proxy: Proxy, partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_ANSWER_SECONDS", 0.5)
    proxy.drips = True
    assert "cloud.debian.org" in refused("https://cloud.debian.org/x", partial)


@pytest.mark.parametrize("given", ["bytes 0-{n}/{n}", "bytes {n}-{n}/{n}", "bytes {n}", "{n}"])
def test_a_range_of_thousands_of_digits_is_refused(web: Web, partial: Partial, given: str) -> None:
    web.answers["/x"] = ["range " + given.format(n="9" * 5000)]
    refused(f"{web.url}/x", partial)
    assert (len(web.asked), partial.size) == (1, 0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("status 404", "404"),
        ("status 403", "403"),
        ("html", "web page"),
        ("redirect http://localhost/x", "http://localhost/x"),
        ("redirect file:///etc/passwd", "file:///etc/passwd"),
        ("redirect /x", "5"),
    ],
)
def test_what_is_not_the_file_is_refused_with_the_reason_and_leaves_nothing(web: Web, partial: Partial, answer: str, reason: str) -> None:
    web.answers["/x"] = [answer]
    assert reason in refused(f"{web.url}/x", partial)
    assert partial.size == 0


def test_a_redirect_to_another_https_place_is_followed(web: Web, partial: Partial) -> None:
    web.files["/deep/y"] = CONTENT
    web.answers["/x"] = [f"redirect {web.url}/deep/z"]
    web.answers["/deep/z"] = ["redirect y"]
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT
    assert web.paths == ["/x", "/deep/z", "/deep/y"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://x/y", "https"),
        ("HTTP://x/y", "https"),
        ("ftp://x/y", "https://HOST/PATH"),
        ("file:///etc/passwd", "https://HOST/PATH"),
        ("https:///y", "https://HOST/PATH"),
        ("x.qcow2", "https://HOST/PATH"),
        ("https://x:99999/y", "x:99999"),
        ("https://[x/y", "[x"),
        ("https://x/y z", "https://HOST/PATH"),
        ("https://x/y\nz", "https://HOST/PATH"),
        ("https://me:secret@x/y", "password"),
    ],
)
def test_only_a_plain_https_url_is_fetched(url: str, reason: str) -> None:
    with pytest.raises(CatalogError, match=re.escape(reason)) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)
    check_url("https://example.org:8443/a/b.qcow2?c=d")


# -- trust and proxies -------------------------------------------------------------------------------------------------------------------


def test_a_server_with_an_unknown_certificate_is_refused_before_anything_is_asked(
    web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    web.files["/x"] = CONTENT
    message = refused(f"{web.url}/x", partial)
    assert "SSL_CERT_FILE" in message
    assert web.asked == []


def test_a_server_whose_certificate_is_for_other_names_is_refused(web: Web, partial: Partial) -> None:
    message = refused(f"https://127.0.0.1:{web.server_port}/x", partial)
    assert "certificate" in message


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates_that_the_environment_names_are_trusted(
    web: Web, partial: Partial, authority: Authority, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv(variable, str(authority.certificate))
    web.files["/x"] = CONTENT
    transfer(f"{web.url}/x", partial).run()
    assert partial.path.read_bytes() == CONTENT


def test_certificates_that_are_not_there_are_named(web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file.pem")
    assert "/no/such/file.pem" in refused(f"{web.url}/x", partial)


def test_a_proxy_is_used_and_told_who_we_are_if_it_is_to_know(
    proxy: Proxy, web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["/x"] = CONTENT
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:se%40cret@{proxy.address}")
    transfer("https://cloud.debian.org/x", partial).run()
    assert partial.path.read_bytes() == CONTENT
    assert proxy.hosts == ["cloud.debian.org"]
    assert proxy.logins == ["Basic bWU6c2VAY3JldA=="]


@pytest.mark.parametrize("value", ["localhost", ".example.org,localhost", "localhost:{port}", "*"])
def test_a_host_in_no_proxy_is_reached_directly(
    proxy: Proxy, web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("NO_PROXY", value.format(port=web.server_port))
    web.files["/x"] = CONTENT
    transfer(f"{web.url}/x", partial).run()
    assert proxy.hosts == []


def test_a_proxy_that_lets_nobody_through_is_named_and_its_password_is_not(
    proxy: Proxy, partial: Partial, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.refusal = "407 Proxy Authentication Required"
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@{proxy.address}")
    message = refused("https://cloud.debian.org/x", partial)
    assert "407" in message
    assert "HTTPS_PROXY" in message
    assert "secret" not in message


def test_a_proxy_of_another_kind_is_refused(web: Web, partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
    assert "socks5" in refused(f"{web.url}/x", partial)


def test_a_redirect_is_not_let_through_to_http_by_a_proxy_either(proxy: Proxy, web: Web, partial: Partial) -> None:
    web.answers["/x"] = ["redirect http://cloud.debian.org/x"]
    assert "https" in refused("https://cloud.debian.org/x", partial)
    assert proxy.hosts == ["cloud.debian.org"]


def test_a_host_that_has_no_address_is_told_from_one_that_does_not_answer(web: Web, partial: Partial) -> None:
    assert "nowhere.invalid" in refused("https://nowhere.invalid/x", partial)
    port = web.server_port
    web.shutdown()
    web.server_close()
    message = refused(f"https://localhost:{port}/x", partial)
    assert "refused" in message
    assert "vmbottle image add" in message


# -- small files -------------------------------------------------------------------------------------------------------------------------


def test_a_small_text_is_fetched(web: Web) -> None:
    web.files["/sums"] = b"abc  x\n"
    assert fetch_text(f"{web.url}/sums", what="the list") == "abc  x\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("status 404", "404"),
        ("status 503", "503"),
        ("html", "web page"),
        ("endless", r"1\.0 MiB"),
        ("redirect http://localhost/x", "http://localhost/x"),
        ("cut 0.5", "the list"),
    ],
)
def test_a_small_text_that_is_something_else_is_refused(web: Web, answer: str, reason: str) -> None:
    web.files["/sums"] = b"abc  x\n"
    web.answers["/sums"] = [answer]
    with pytest.raises(CatalogError, match=reason):
        fetch_text(f"{web.url}/sums", what="the list")


@pytest.mark.timeout(60)
def test_a_small_text_that_drips_is_left_at_its_deadline(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TEXT_SECONDS", 0.3)
    web.files["/sums"] = CONTENT
    web.answers["/sums"] = ["drip"]
    with pytest.raises(CatalogError, match="the list"):
        fetch_text(f"{web.url}/sums", what="the list")


# -- the folder --------------------------------------------------------------------------------------------------------------------------


def test_only_one_at_a_time_fetches_the_same(tmp_path: Path) -> None:
    downloads, held = Downloads(tmp_path / "downloads"), threading.Event()
    order: list[str] = []

    def waiting(words: str) -> None:
        order.append(words)
        held.set()

    def second() -> None:
        with downloads.partial("x", deadline=Deadline(30), waiting=waiting):
            order.append("second")

    with downloads.partial("x", deadline=Deadline(60), waiting=print):
        thread = threading.Thread(target=second)
        thread.start()
        assert held.wait(30)
        order.append("first")
    thread.join()
    assert str(os.getpid()) in order[0]
    assert order[1:] == ["first", "second"]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["x"]


def test_who_waits_too_long_for_another_one_is_told_so(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "downloads")
    with (
        downloads.partial("x", deadline=Deadline(60), waiting=print),
        pytest.raises(CatalogError, match=str(os.getpid())),
        downloads.partial("x", deadline=Deadline(0.1), waiting=print),
    ):
        pass


def test_what_nobody_goes_on_with_is_removed_after_a_week_unless_it_is_held(tmp_path: Path) -> None:
    downloads, eight_days_ago = Downloads(tmp_path / "downloads"), time.time() - 8 * 86400
    with downloads.partial("held", deadline=Deadline(60), waiting=print) as held:
        for name, changed in (
            ("old", eight_days_ago),
            ("old.json", eight_days_ago),
            ("new", time.time()),
            ("held", eight_days_ago),
            ("new.json", eight_days_ago),
        ):
            path = held.path.with_name(name)
            path.touch()
            os.utime(path, (changed, changed))
        with downloads.partial("other", deadline=Deadline(60), waiting=print):
            there = {path.name for path in held.path.parent.iterdir() if path.suffix != ".holder"}
            assert there == {"new", "new.json", "held", "other"}


def test_downloads_that_end_while_another_begins_do_not_disturb_it(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "downloads")

    def go(key: str) -> int:
        for _ in range(300):
            with downloads.partial(key, deadline=Deadline(60), waiting=print) as partial:
                partial.restart("name")
                partial.remove()
        return 300

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(go, ("one", "two", "three"))) == [300] * 3


def test_a_symbolic_link_in_the_place_of_a_download_is_not_followed(tmp_path: Path) -> None:
    downloads = Downloads(tmp_path / "downloads")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "x").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), downloads.partial("x", deadline=Deadline(1), waiting=print):
        pass
    assert not (tmp_path / "precious").exists()


def test_a_file_that_its_holder_removes_just_when_it_is_taken_over_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, locks = tmp_path / "downloads" / "x", iter([True])

    def lock(fd: int, how: int) -> None:
        if next(locks, False):
            path.unlink()
        flock(fd, how)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lock)
    with Downloads(tmp_path / "downloads").partial("x", deadline=Deadline(30), waiting=print) as partial:
        assert partial.size == 0
    assert next(locks, None) is None
