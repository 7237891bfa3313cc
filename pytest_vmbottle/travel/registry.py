"""Repository of an OCI registry: artifacts of one file each, found by tag or digest, and never believed before their digest is checked.

The protocol is that of the OCI distribution specification 1.1; logins are those that `docker login` stored.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import ssl
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urljoin

import attrs
import oras.container
import oras.provider
import requests

from pytest_vmbottle.errors import CatalogError
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.digests import content_digest
from pytest_vmbottle.host.sizes import format_size
from pytest_vmbottle.images.download import Downloads, Partial
from pytest_vmbottle.shown import printable
from pytest_vmbottle.spec.reference import DIGEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pytest_vmbottle.spec.reference import Reference

# Its messages are none of this program's, and went to standard error.
logging.getLogger("oras.logger").handlers[:] = [logging.NullHandler()]

T = TypeVar("T")

__all__ = ["Artifact", "RegistryError", "Repository"]

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_ARTIFACT = "application/vnd.pytest-vmbottle.v1"
_ARCHIVE = f"{_ARTIFACT}+zip"
_EMPTY = b"{}"
"""Content of the config that each artifact must have (OCI image specification, "Guidance for an empty descriptor")."""
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_TIMEOUT = (30.0, 60.0)
"""Seconds for a connection, and for which a registry may send nothing."""
_ATTEMPTS = 4
_PAUSE = 1.0
_LARGEST_MANIFEST = 4 << 20
_LARGEST_BLOB = 64 << 30
_TRANSFER_SECONDS = 2 * 3600.0
_CHUNK = 64 << 10
"""Bytes that are kept together: of a part that was cut off, nothing is."""
_OK, _CREATED, _ACCEPTED, _PARTIAL, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND = 200, 201, 202, 206, 401, 403, 404
_BUSY = {408, 425, 429, 500, 502, 503, 504}


class RegistryError(CatalogError):
    """A registry cannot be used."""


class _BusyError(Exception):
    """A registry may do later what it does not do now."""


@attrs.frozen(kw_only=True)
class Artifact:
    """A file with its annotations, as a repository has it under a tag or a digest.

    Attributes:
        digest: Digest of its manifest, by which it is always the same one.
        annotations: What was noted of it.
        blob: Digest of its file.
        size: Bytes of its file.
        manifest: The manifest.
    """

    digest: str
    annotations: Mapping[str, str]
    blob: str
    size: int
    manifest: bytes = attrs.field(repr=False)


class Repository:
    """A repository of an OCI registry."""

    def __init__(self, reference: Reference, *, say: Callable[[str], None], downloads: Path) -> None:
        """Connect to nothing yet.

        Args:
            reference: The repository's name.
            say: Function that is told of long work.
            downloads: Folder of unfinished downloads, which the next one resumes.
        """
        self.reference = reference
        self._say, self._downloads = say, downloads
        self._client = _Client(reference)

    def find(self, which: str) -> Artifact | None:
        """Return the artifact of a tag or digest, or None if there is none.

        Raises:
            RegistryError: The registry cannot be asked, or has something else there.
        """
        content = self._insist(lambda: self._manifest(which), "read")
        if content is None:
            return None
        digest = _digest(content)
        if which.startswith("sha256:") and digest != which:
            raise RegistryError(f"{self.reference.repository} sent another manifest than {which}: its digest is {digest}")
        with suppress(ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            facts = json.loads(content)
            (layer,) = facts["layers"]
            if layer["mediaType"] == _ARCHIVE and re.fullmatch(DIGEST, layer["digest"]) and 0 < int(layer["size"]) <= _LARGEST_BLOB:
                annotations = {str(key): str(value) for key, value in facts["annotations"].items()}
                return Artifact(digest=digest, annotations=annotations, blob=layer["digest"], size=int(layer["size"]), manifest=content)
        raise RegistryError(f"{self.reference.repository} has something else under {which}, and no packs or images of this program")

    def _manifest(self, which: str) -> bytes | None:
        with closing(self._client.ask("GET", f"manifests/{which}", headers={"Accept": _MANIFEST}, stream=True)) as response:
            if response.status_code == _NOT_FOUND:
                return None
            self._check(response, "read")
            content = bytearray()
            for chunk in response.iter_content(_CHUNK):
                content += chunk
                if len(content) > _LARGEST_MANIFEST:
                    raise RegistryError(f"{self.reference.repository} sends a manifest of more than {format_size(_LARGEST_MANIFEST)}")
            return bytes(content)

    @contextmanager
    def fetched(self, artifact: Artifact) -> Iterator[Path]:
        """Download the file of an artifact for the length of a block; what an interruption leaves of it is resumed later.

        Raises:
            RegistryError: It cannot be downloaded, or is damaged.
        """
        deadline = Deadline(_TRANSFER_SECONDS)
        with Downloads(self._downloads).partial(artifact.blob.replace(":", "-"), deadline=deadline, waiting=self._say) as partial:
            self._say(f"downloading {format_size(artifact.size)} from {self.reference.repository}")
            self._insist(lambda: self._download(artifact, partial, deadline), "download from")
            with partial.path.open("rb") as file:
                sound = content_digest(file.fileno(), algorithm="sha256") == artifact.blob.partition(":")[2]
            if not sound:
                partial.remove()
                raise RegistryError(f"{self.reference.repository} sent other content than {artifact.blob[:19]}: it was deleted")
            yield partial.path
            partial.remove()

    def _download(self, artifact: Artifact, partial: Partial, deadline: Deadline) -> None:
        there = partial.size
        if there > artifact.size:
            partial.restart("")
            there = 0
        if there == artifact.size:
            return
        headers = {"Range": f"bytes={there}-"} if there else {}
        with closing(self._client.ask("GET", f"blobs/{artifact.blob}", headers=headers, stream=True)) as response:
            self._check(response, "download")
            if response.status_code != _PARTIAL and there:  # it does not know of ranges
                partial.restart("")
                there = 0
            with partial.path.open("ab") as file:
                for chunk in response.iter_content(_CHUNK):
                    there += len(chunk)
                    if there > artifact.size or deadline.expired:
                        raise RegistryError(f"{self.reference.repository} sends more than {format_size(artifact.size)}, or is too slow")
                    file.write(chunk)
                    file.flush()  # kept even if we are killed
        if there < artifact.size:
            raise requests.ConnectionError(f"the connection ended after {format_size(there)} of {format_size(artifact.size)}")

    def push(self, tag: str, file: Path, annotations: Mapping[str, str]) -> Artifact:
        """Upload a file as the artifact of a tag; content that is there is not sent again.

        Raises:
            RegistryError: The registry did not take it.
        """
        with file.open("rb") as opened:
            blob = f"sha256:{content_digest(opened.fileno(), algorithm='sha256')}"
        size = file.stat().st_size
        with io.BytesIO(_EMPTY) as config:
            self._upload(_digest(_EMPTY), config)
        self._say(f"uploading {format_size(size)} to {self.reference.repository}")
        with file.open("rb") as opened:
            self._upload(blob, opened)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": _ARTIFACT,
            "config": {"mediaType": _EMPTY_TYPE, "digest": _digest(_EMPTY), "size": len(_EMPTY)},
            "layers": [{"mediaType": _ARCHIVE, "digest": blob, "size": size}],
            "annotations": dict(annotations),
        }
        content = json.dumps(manifest, sort_keys=True).encode()
        artifact = Artifact(digest=_digest(content), annotations=annotations, blob=blob, size=size, manifest=content)
        self.tag(artifact, tag)
        return artifact

    def tag(self, artifact: Artifact, tag: str) -> None:
        """Give an artifact a tag, which another one may have had.

        Raises:
            RegistryError: The registry did not take it.
        """

        def put() -> None:
            content, headers = io.BytesIO(artifact.manifest), {"Content-Type": _MANIFEST}
            self._check(self._client.ask("PUT", f"manifests/{tag}", headers=headers, data=content), "upload")

        self._insist(put, "upload to")

    def _upload(self, digest: str, content: IO[bytes]) -> None:
        def upload() -> None:
            if self._client.ask("HEAD", f"blobs/{digest}").status_code == _OK:
                return
            begun = self._client.ask("POST", "blobs/uploads/")
            self._check(begun, "upload")
            # The URL of the upload has a query of its own, and may lie on another host.
            place = urljoin(begun.url, begun.headers.get("Location", ""))
            if not place.startswith(f"{self._client.prefix}://"):
                raise RegistryError(f"{self.reference.repository} wants an upload without TLS, to {printable(place)[:100]}: it is not sent")
            place += ("&" if "?" in place else "?") + urlencode({"digest": digest})
            content.seek(0)
            self._check(self._client.send("PUT", place, headers={"Content-Type": "application/octet-stream"}, data=content), "upload")

        self._insist(upload, "upload to")

    def _insist(self, ask: Callable[[], T], what: str) -> T:
        """Call a function again if the connection breaks or the registry is busy.

        Raises:
            RegistryError: It fails each time.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return ask()
            except (requests.RequestException, _BusyError) as error:
                if attempt == _ATTEMPTS:
                    raise RegistryError(f"cannot {what} {self.reference.repository}: {_reason(error)}. Try again later") from error
                self._say(f"{self.reference.host}: {_reason(error)}; trying again")
                time.sleep(_PAUSE * attempt)
        raise AssertionError("unreachable")

    def _check(self, response: requests.Response, what: str) -> None:
        """Raise an error for an answer that is none.

        Raises:
            RegistryError: The registry refused.
            _BusyError: It may take it later.
        """
        status, name = response.status_code, self.reference.repository
        if status in (_OK, _CREATED, _ACCEPTED, _PARTIAL):
            return
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            raise RegistryError(
                f"{name} does not allow to {what} (HTTP {status}): log in with `docker login {self.reference.host}`, by an account or a "
                f"token that may"
            )
        reason = f"HTTP {status}{_told(response)}"
        if status in _BUSY:
            raise _BusyError(reason)
        raise RegistryError(f"cannot {what}: {name} answered {reason}")


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _reason(error: Exception) -> str:
    """Return why a request failed: the system's own words, which are deep in those of the libraries, if it has any."""
    words = re.search(r"\[Errno -?\d+\] ([^\"'()\]]+)|certificate verify failed: [^\"'()]+", str(error))
    return printable((words[1] or words[0]).strip() if words else str(error))


def _told(response: requests.Response) -> str:
    """Return a registry's own words about an error, if it has any."""
    with suppress(ValueError, TypeError, KeyError, AttributeError, requests.RequestException):
        return f": {printable('; '.join(str(error['message']) for error in response.json()['errors']))[:300]}"
    return ""


class _Client(oras.provider.Registry):  # type: ignore[misc] # it comes without types
    """Requests to one repository.

    With waits that end: those of the base class try for two minutes whatever the answer is, and keep a token that has expired.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__(insecure=_is_loopback(reference.host), tls_verify=_certificates())
        self._root = f"{self.prefix}://{reference.host}/v2/{reference.name}"
        # Those for tokens too, which the base class sends without an end.
        self.session.request = partial(self.session.request, timeout=_TIMEOUT)
        folder = os.environ.get("DOCKER_CONFIG")
        try:
            self.auth.load_configs(oras.container.Container(reference.repository), configs=[f"{folder}/config.json"] if folder else None)
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise RegistryError(
                f"the logins that Docker stored cannot be read: {error}: mend config.json in {folder or '~/.docker'}, or log in again"
            ) from error
        self._authorization: dict[str, str] = {}

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request to a path in the repository."""
        return self.send(method, f"{self._root}/{path}", **options)

    def send(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, data: IO[bytes] | None = None, stream: bool = False
    ) -> requests.Response:
        """Send a request, and once more with a login if that is wanted."""

        def once() -> requests.Response:
            # An upload may go to a storage of another name, which the login is not for.
            sent = {**(headers or {}), **(self._authorization if url.startswith(self._root) else {})}
            session: requests.Session = self.session
            return session.request(method, url, headers=sent, data=data, stream=stream, verify=self._tls_verify)

        response = once()
        if response.status_code == _UNAUTHORIZED and self._log_in(response):
            response.close()
            if data is not None:
                data.seek(0)
            response = once()
        return response

    def _log_in(self, refused: requests.Response) -> bool:
        """Get ready what a registry asks for; return whether there is anything new to try."""
        before, self.auth.token, wanted = self._authorization, None, refused.headers.get("WWW-Authenticate", "")
        login = getattr(self.auth, "_basic_auth", "")
        if not refused.url.startswith(self._root):  # a storage, which must not learn the login
            return False
        if wanted.lower().startswith("basic"):
            self._authorization = {"Authorization": f"Basic {login}"} if login else {}
        elif re.search(rf'realm="{self.prefix}s?://', wanted):  # over TLS, if the registry is
            self._authorization, _ = self.auth.authenticate_request(refused, {})
        return bool(self._authorization) and self._authorization != before


def _is_loopback(host: str) -> bool:
    """Tell whether a registry is on this computer, where plain HTTP is as good (as Docker has it)."""
    name = host.rpartition(":")[0] or host
    with suppress(ValueError):
        return ip_address(name).is_loopback
    return name == "localhost"


def _certificates() -> str | bool:
    """Return where the certificates are that this computer trusts, or true for those that come with requests."""
    paths = ssl.get_default_verify_paths()
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or paths.cafile or paths.capath or True
