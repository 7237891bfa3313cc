"""Downloads from https servers.

They are limited in size and time, and resume where a transfer broke off.

Content of a server is hostile input: nothing is trusted before the caller has compared its checksum.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import ssl
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import attrs
import urllib3
from urllib3 import exceptions as faults
from urllib3.connection import HTTPSConnection

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host import records
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.host.locks import tried, try_lock
from pytest_vmbottle.host.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Downloads", "Partial", "Transfer", "check_url", "fetch_text"]

_CONNECT_SECONDS = 30.0
_SILENT_SECONDS = 60.0
"""Seconds for which a server may send nothing."""
_ANSWER_SECONDS = 90.0
"""Seconds within which the head of an answer must be complete, whatever a server sends meanwhile."""
_GRACE_SECONDS = 5.0
"""Seconds after its deadline in which a transfer may still end by itself."""
_TEXT_SECONDS = 120.0
_MAX_TEXT = 1 << 20
_CHUNK = 1 << 20
_REDIRECTS = 5
_ATTEMPTS = 5
_PAUSE = 2.0
"""Seconds before a transfer that broke off is resumed."""
_OLD_SECONDS = 7 * 86400
_OK, _PARTIAL, _NO_SUCH_RANGE = 200, 206, 416
# Statuses of a server, or of a proxy before it, that is busy or has lost the other side for a moment.
_LATER = {408, 425, 429, 500, 502, 503, 504}
# Digits are limited, because a server may send thousands, and int() refuses such numbers.
_RANGE = re.compile(r"bytes (?P<start>[0-9]{1,18})-[0-9]{1,18}/(?P<total>[0-9]{1,18})")


class _BrokenOffError(Exception):
    """A transfer ended early, and may be resumed."""


class _UnreachableError(CatalogError):
    """A server cannot be reached, or no longer."""


def check_url(url: str) -> None:
    """Refuse everything but a plain https URL.

    Raises:
        CatalogError: It is not such a URL; the message says what to do.
    """
    try:
        parts = urlsplit(url)
        port_is_sane, host = parts.port != 0, parts.hostname
    except ValueError:
        raise CatalogError(f"{url!r} is not a URL: write https://HOST/PATH") from None
    if parts.scheme.lower() == "http":
        raise CatalogError(f"{url} is not fetched: over http anybody on the way could change it; use https")
    if parts.scheme.lower() != "https" or not host or not port_is_sane or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise CatalogError(f"{url!r} is not a URL to fetch an image from: write https://HOST/PATH")
    if parts.username is not None:
        raise CatalogError(
            f"a URL on {host} with a password in it is not used: it would end up in logs; download the file and add it by hand"
        )


def fetch_text(url: str, *, what: str) -> str:
    """Fetch a small text file, such as a list of checksums.

    Args:
        url: The https URL.
        what: The file's name in messages.

    Raises:
        CatalogError: It cannot be downloaded, or is not text of less than 1 MiB; the message says what to do.
    """
    deadline = Deadline(_TEXT_SECONDS)
    content = bytearray()
    try:
        with _get(url, {}, what, deadline) as response:
            _check_answer(response, url, what)
            while chunk := response.read1(_CHUNK, decode_content=False):
                content += chunk
                if len(content) > _MAX_TEXT:
                    raise CatalogError(f"{what} at {url} is larger than {format_size(_MAX_TEXT)}: the server must have sent something else")
                if deadline.expired:
                    raise CatalogError(f"{what} at {url} had not arrived after {deadline.seconds:.0f} s: try again later")
    except (_BrokenOffError, faults.HTTPError, OSError) as error:
        raise CatalogError(f"{what} at {url} is incomplete: the connection broke ({error}). Try again") from error
    return content.decode(errors="replace")


@attrs.frozen
class Partial:
    """A partly downloaded file, and its server's name for this content.

    The name is an ETag or a date, by which another content is noticed.
    """

    path: Path

    @property
    def _record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def size(self) -> int:
        """The number of bytes that have been downloaded."""
        return self.path.stat().st_size

    @property
    def validator(self) -> str:
        """The server's name for the content of these bytes."""
        with suppress(OSError, records.Damaged):
            return records.read_as(self._record, lambda facts: str(facts["validator"]))
        return ""

    def restart(self, validator: str) -> None:
        """Discard the downloaded bytes."""
        # Emptied before the new name is noted: after a crash in between, old bytes must not go by the name of new content. Not replaced,
        # because the lock is on this very file.
        os.truncate(self.path, 0)
        records.write(self._record, {"validator": validator})

    def remove(self) -> None:
        """Remove the file, finished or worthless."""
        self.path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)


class Downloads:
    """A private folder of unfinished downloads.

    Those that were not resumed for a week are removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def partial(self, key: str, *, deadline: Deadline, waiting: Callable[[str], None]) -> Iterator[Partial]:
        """Lock and yield the file for `key`, so that nobody else downloads the same.

        Raises:
            CatalogError: Another process has held it until the deadline.
        """
        self._sweep()
        path = private_dir(self._folder) / key
        # Tried without waiting first, to tell the user why nothing happens.
        fd = try_lock(path, create=True)
        holder = path.with_name(f"{key}.holder")
        if fd is None:
            waiting(f"waiting for another process that downloads the same: {records.describe_holder(holder)}")
            fd = try_lock(path, create=True, deadline=deadline)
        if fd is None:
            raise CatalogError(
                f"another process was still downloading the same after {deadline.seconds:.0f} s: {records.describe_holder(holder)}; "
                "try again when it has ended"
            )
        records.note_holder(holder, since=time.time())
        try:
            yield Partial(path)
        finally:
            # Before the lock is released: after that it may be the next holder's.
            holder.unlink(missing_ok=True)
            os.close(fd)

    def _sweep(self) -> None:
        for path in self._folder.glob("*") if self._folder.is_dir() else ():
            with suppress(OSError):
                # The record beside a file is written at its start only: both are as old as what was written last.
                key = path.name.partition(".")[0]
                # Both may have gone by now, as each download removes its own.
                now = time.time()
                if now - max((mate.stat().st_mtime for mate in self._folder.glob(f"{key}*")), default=now) > _OLD_SECONDS:
                    with tried(path) as is_ours:
                        if is_ours:
                            path.unlink()


@attrs.frozen(kw_only=True)
class Transfer:
    """A download of a large file.

    Attributes:
        url: The https URL.
        partial: The file to write to.
        what: The file's name in messages.
        max_size: Maximum size in bytes; a larger file is refused.
        deadline: Deadline of the download.
        progress: Function that gets a line about the progress.
        every: Seconds between two such lines.
    """

    url: str
    partial: Partial
    what: str
    max_size: int
    deadline: Deadline
    progress: Callable[[str], None]
    every: float = 5.0

    def run(self) -> None:
        """Download the file, or its missing part.

        A transfer that breaks off is resumed a few times; after that, the bytes are kept, and the next download resumes there.

        Raises:
            CatalogError: It cannot be downloaded; the message says what to do.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._go_on()
            except (_BrokenOffError, _UnreachableError, TimeoutError) as error:
                # A server that cannot be reached at first is probably wrong or blocked; one that is lost later may come back.
                if attempt == 1 and isinstance(error, _UnreachableError):
                    raise
                there = format_size(self.partial.size)
                if attempt == _ATTEMPTS or self.deadline.remaining <= _PAUSE:
                    hint = f"Run it again: the download resumes after {there}"
                    raise CatalogError(f"{self.what} from {self.url} is incomplete: {error}. {hint}") from None
                self.progress(f"{error}; resuming after {there}")
                time.sleep(_PAUSE)
        return None

    def _go_on(self) -> None:
        size, validator = self.partial.size, self.partial.validator
        # Without a name for the content the bytes could be of another: from the start, then.
        # If-Range has a server whose content is another one by now send all of it (RFC 9110, 13.1.5).
        headers = {"Range": f"bytes={size}-", "If-Range": validator} if size and validator else {}
        with _get(self.url, headers, self.what, self.deadline) as response:
            if response.status == _NO_SUCH_RANGE and headers:
                if response.headers.get("Content-Range") == f"bytes */{size}":  # it is all there
                    return
                self.partial.restart("")
                raise _BrokenOffError("the file on the server has changed")
            _check_answer(response, self.url, self.what)
            self._receive(response, *_extent(response, size))

    def _receive(self, response: urllib3.BaseHTTPResponse, start: int, total: int | None) -> None:
        if total is not None:
            if total > self.max_size:
                allowed = f"more than the {format_size(self.max_size)} that are allowed"
                raise CatalogError(f"{self.what} at {self.url} has {format_size(total)}, {allowed}")
            # Before the first byte: a disk that fills up would disturb everybody else on it.
            _check_space(self.partial.path, total - start)
        if start == 0:
            self.partial.restart(_validator(response))
        meter = _Meter(self.progress, self.every, start)
        done = start
        with self.partial.path.open("ab") as file:
            for chunk in _chunks(response, start, total):
                done += len(chunk)
                # The announced length may be missing or wrong, so what comes is counted.
                if done > self.max_size:
                    # Nothing that could be resumed.
                    file.truncate(0)
                    raise CatalogError(
                        f"{self.what} at {self.url} is not an image: more than {format_size(self.max_size)} came, and no end"
                    )
                file.write(chunk)
                file.flush()  # kept even if we are killed
                meter.tell(done, total)
                if self.deadline.expired:
                    seconds = f"{self.deadline.seconds:.0f} s"
                    raise CatalogError(f"{self.url} timed out after {seconds}, with {_of(done, total)}. Run it again: the download resumes")


def _chunks(response: urllib3.BaseHTTPResponse, start: int, total: int | None) -> Iterator[bytes]:
    """Yield the rest of a file as it comes; raise if it is too short."""
    done = start
    while True:
        try:
            # What there is by now: waiting for more would let a server that drips escape the deadline.
            chunk = response.read1(_CHUNK, decode_content=False)
        except (faults.HTTPError, OSError) as error:
            silent = isinstance(error, faults.ReadTimeoutError | TimeoutError)
            happened = f"the server sent nothing for {_SILENT_SECONDS:.0f} s" if silent else "the connection broke"
            raise _BrokenOffError(f"{happened} after {_of(done, total)}") from error
        if not chunk:
            break
        yield chunk
        done += len(chunk)
    if total is not None and done < total:
        raise _BrokenOffError(f"the connection ended after {_of(done, total)}")


def _extent(response: urllib3.BaseHTTPResponse, size: int) -> tuple[int, int | None]:
    """Return the first byte's position of an answer, and the file's length if it is known."""
    if response.status == _PARTIAL:
        match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match["start"]) != size:
            raise CatalogError("the server sent another part of the file than requested: try again later")
        return size, int(match["total"])
    # Some servers ignore the range and send the whole file: then it begins at 0 again.
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _validator(response: urllib3.BaseHTTPResponse) -> str:
    """Return a reliable name for the content: a strong ETag, or else the date (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    # A weak ETag stands for equivalent content, which may differ in its bytes.
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _of(done: int, total: int | None) -> str:
    return format_size(done) + (f" of {format_size(total)}" if total is not None else "")


def _check_space(path: Path, missing: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < missing:
        has, needs = format_size(free), format_size(missing)
        raise CatalogError(f"{path.parent} has {has} free, and the download needs {needs}: make room, then run it again")


@attrs.define
class _Meter:
    """Progress messages of a transfer, from time to time."""

    _progress: Callable[[str], None]
    _every: float
    _first: int
    _began: float = attrs.field(init=False, factory=time.monotonic)
    _told: float = attrs.field(init=False, factory=time.monotonic)

    def tell(self, done: int, total: int | None) -> None:
        """Report the progress, unless it was reported just now or the transfer ends."""
        now = time.monotonic()
        if done == total or now - self._told < self._every:
            return
        self._told = now
        speed = int((done - self._first) / max(now - self._began, 0.001))
        share = f"{100 * done // total:3d} %  " if total else ""
        self._progress(f"{share}{_of(done, total)}, {format_size(speed)}/s")


# -- connections -----------------------------------------------------------------------------------------------------------------------


class _Watch:
    """A limit on the whole time of an exchange.

    The time-out of a socket begins anew with each byte, so it does not limit the whole.
    """

    def __init__(self) -> None:
        self._socket: Callable[[], socket.socket | None] = lambda: None

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Cut the connection if the block takes longer.

        Raises:
            TimeoutError: It took longer. This holds even if the block succeeded, because a truncated answer may look complete.
        """
        late = threading.Event()

        def cut() -> None:
            late.set()
            # In the timer's thread. Not closed: that wakes no thread that reads the socket, and its number could soon be another file's.
            with suppress(OSError):
                if (sock := self._socket()) is not None:
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not as TLS does it, which would go on in plain text

        timer = threading.Timer(max(seconds, 0.0), cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (_BrokenOffError, faults.HTTPError, OSError):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():
            raise TimeoutError(f"the server had not finished after {seconds:.0f} s")

    def pool_class(self) -> type[urllib3.HTTPSConnectionPool]:
        """Return a class of connections that this limit can cut."""
        watch = self

        class Connection(HTTPSConnection):
            def connect(self) -> None:
                watch._socket = lambda: self.sock  # there as soon as a proxy is asked
                super().connect()

            def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override] # as urllib3's own
                sock = self.sock  # which the answer takes over
                watch._socket = lambda: sock
                return super().getresponse()

        class Pool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Connection

        return Pool


@contextmanager
def _get(url: str, headers: dict[str, str], what: str, deadline: Deadline) -> Iterator[urllib3.BaseHTTPResponse]:
    """Request a URL and follow its redirects, over https alone."""
    context, asked, watch = _trusted(), url, _Watch()
    # As it is stored: a compression on the way would make lengths and digests those of something else.
    headers = {"User-Agent": "pytest-vmbottle", "Accept-Encoding": "identity", **headers}
    for _ in range(_REDIRECTS + 1):
        with _connected(url, context) as pool, ExitStack() as answers:
            # A new table for this manager, because the old one is shared by all users of urllib3 in the process.
            pool.pool_classes_by_scheme = {**pool.pool_classes_by_scheme, "https": watch.pool_class()}
            with _explained(url, what), watch.limit(_ANSWER_SECONDS):
                # Without urllib3's retries: `Transfer` tries again, and knows where to go on.
                response = pool.request(
                    "GET", url, headers=headers, redirect=False, retries=False, preload_content=False, timeout=_timeout()
                )
                answers.enter_context(closing(response))  # what was not read is not wanted
            # By ourselves and not by urllib3, so that each target is checked: none may leave https.
            target = response.get_redirect_location()
            if not target:
                with watch.limit(deadline.remaining + _GRACE_SECONDS):  # a row of trailers has no end either
                    yield response
                return
        url = urljoin(url, target)
        try:
            check_url(url)
        except CatalogError as error:
            raise CatalogError(f"{asked} redirects to a URL that is refused: {error}") from None
    raise CatalogError(f"{asked} redirects more than {_REDIRECTS} times: try again later, or give another URL")


def _timeout() -> urllib3.Timeout:
    return urllib3.Timeout(connect=_CONNECT_SECONDS, read=_SILENT_SECONDS)


@contextmanager
def _connected(url: str, context: ssl.SSLContext) -> Iterator[urllib3.PoolManager]:
    """Yield a pool manager for a server, through the proxy that the environment names (HTTPS_PROXY, ALL_PROXY, NO_PROXY)."""
    proxies = {} if proxy_bypass(urlsplit(url).netloc) else getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    pool = urllib3.PoolManager(ssl_context=context) if not proxy else _through(proxy, context)
    try:
        yield pool
    finally:
        pool.clear()


def _through(proxy: str, context: ssl.SSLContext) -> urllib3.ProxyManager:
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    parts = urlsplit(proxy)
    if parts.scheme not in ("http", "https"):
        raise CatalogError(
            f"HTTPS_PROXY names a {parts.scheme} proxy, which cannot be used: name an http one, or list the host in NO_PROXY"
        )
    # A login for the proxy goes in a header: in its URL it would end up in messages.
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login).decode()}"} if parts.username else {}
    return urllib3.ProxyManager(
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", ssl_context=context, proxy_ssl_context=context, proxy_headers=headers
    )


def _trusted() -> ssl.SSLContext:
    """Load the certificates that this computer trusts, or those that the environment names, as curl, OpenSSL and requests do."""
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    try:
        if named and Path(named).is_dir():
            return ssl.create_default_context(capath=named)
        return ssl.create_default_context(cafile=named or None)  # without a name also SSL_CERT_FILE and SSL_CERT_DIR
    except OSError as error:
        remedy = "fix or unset REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"
        raise CatalogError(f"the certificates in {named} cannot be read ({error}): {remedy}") from None


@contextmanager
def _explained(url: str, what: str) -> Iterator[None]:
    """Turn connection errors into a `CatalogError` with a sentence."""
    host = urlsplit(url).hostname
    try:
        yield
    # From the special to the general, because all four are HTTPErrors.
    except faults.ProxyError as error:
        reason = f"the proxy refuses the connection to {host} ({_cause(error)})"
        raise _UnreachableError(f"{what} cannot be fetched: {reason}. {_PROXY}") from error
    except faults.SSLError as error:
        raise CatalogError(f"{what} is not fetched: the certificate of {host} is not trusted ({_cause(error)}). {_CERTIFICATES}") from error
    except faults.NameResolutionError as error:
        raise _UnreachableError(f"{what} cannot be fetched: there is no address for {host} (DNS). {_NETWORK}") from error
    except faults.HTTPError as error:
        raise _UnreachableError(f"{what} cannot be fetched: {host} does not answer ({_cause(error)}). {_NETWORK}") from error
    except TimeoutError as error:
        raise _UnreachableError(f"{what} cannot be fetched: {host} does not answer ({error}). {_NETWORK}") from error
    except (UnicodeError, ValueError) as error:
        raise CatalogError(f"{what} cannot be fetched: {url!r} is not a URL ({error})") from error


_NETWORK = "Check the network and HTTPS_PROXY. Where there is no network, copy the file here: `vmbottle image add FILE --name NAME`"
_PROXY = "Check HTTPS_PROXY, or list the host in NO_PROXY"
_CERTIFICATES = "If a proxy inspects TLS, set SSL_CERT_FILE to its certificate; if this computer has none, install ca-certificates"


def _cause(error: BaseException) -> str:
    """Return the innermost of an error's causes, in a few words."""
    inner = next((part for part in (getattr(error, "reason", None), *error.args) if isinstance(part, BaseException)), None)
    if inner is not None and inner is not error:
        return _cause(inner)
    message = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error)
    return str(message).rpartition(": ")[2] or type(error).__name__


def _check_answer(response: urllib3.BaseHTTPResponse, url: str, what: str) -> None:
    """Refuse an answer that is not the requested file."""
    if response.status in _LATER:
        raise _BrokenOffError(f"{urlsplit(url).hostname} answers {response.status}")
    if response.status not in (_OK, _PARTIAL):
        raise CatalogError(f"{what} is not at {url}: the server answers {response.status}. It may have been moved or withdrawn")
    # A captive portal answers any request with its login page and status 200.
    if response.headers.get("Content-Type", "").partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
        raise CatalogError(f"{url} is a web page, not {what}: perhaps this network requires a login, or the URL is that of a page about it")
