"""Packs and images go through a real registry on loopback."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.packs import Pack
from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.images import ImageStore
from pytest_vmbottle.spec.reference import Reference
from pytest_vmbottle.travel import registry as module
from pytest_vmbottle.travel.exchange import Exchange, image_tag
from pytest_vmbottle.travel.registry import RegistryError
from pytest_vmbottle.travel.run_registry import RunRegistry, open_exchange
from tests.registries import DockerRegistry, cut_off, docker_registry, log_in, passwords, served, token_server
from tests.unit.conftest import Authority
from tests.unit.travel.conftest import Home, catalog, publish, quiet


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before something is tried again."""
    monkeypatch.setattr(module, "_PAUSE", 0.0)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository that no other test has."""
    return f"team/{re.sub('[^a-z]+', '-', request.node.name.lower()).strip('-')}"


def exchange(there: Catalog, reference: str, lines: list[str] | None = None) -> Exchange:
    return open_exchange(Reference.parse(reference), there, lambda _: "a computer", lines.append if lines is not None else quiet)


def pulled(there: Catalog, reference: str) -> list[Pack]:
    return exchange(there, reference).pull(Reference.parse(reference).artifact)


@attrs.frozen
class Twin:
    """Another computer's catalog: the same image, and packs of the same keys, made there."""

    catalog: Catalog
    base: Pack
    layer: Pack


@pytest.fixture
def twin(home: Home, tmp_path: Path) -> Iterator[Twin]:
    with closing(catalog(tmp_path / "twin")) as made:
        (image,) = ImageStore(home.catalog.images).list()
        ImageStore(made.images).add(image.disk, name="debian-12")
        base = publish(made, "debian-12", [(0, b"other RAM")], home.image)
        yield Twin(made, base, publish(made, "web", [(0, b"other RAM"), (99, b"server")], home.image, base))


def test_packs_and_their_image_arrive_as_they_left_and_nothing_is_sent_twice(
    home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str
) -> None:
    lines: list[str] = []
    here = exchange(home.catalog, f"{registry.host}/{name}", lines)
    pushed = here.push(home.layer, tag="web")
    assert sum("uploading" in line for line in lines) == 3
    lines.clear()
    assert here.push(home.layer) == pushed
    assert not any("uploading" in line for line in lines)
    base, layer = pulled(elsewhere, f"{registry.host}/{name}:web")
    for left, came in ((home.base, base), (home.layer, layer)):
        came.verify()
        assert (came.seal, came.manifest) == (left.seal, left.manifest)
    assert [image.name for image in ImageStore(elsewhere.images).list()] == ["debian-12"]
    assert pulled(elsewhere, f"{registry.host}/{name}:web") == []
    assert not list(elsewhere.root.glob("downloads/*"))


def test_a_layer_sends_only_what_its_parent_has_not(home: Home, registry: DockerRegistry, name: str) -> None:
    here = exchange(home.catalog, f"{registry.host}/{name}")
    assert here.push(home.layer).size < here.push(home.base).size / 50


def test_a_digest_brings_the_very_pack_whatever_its_tags_have_by_now(
    home: Home, twin: Twin, elsewhere: Catalog, registry: DockerRegistry, name: str
) -> None:
    reference = f"{registry.host}/{name}"
    pushed = exchange(home.catalog, reference).push(home.layer, tag="web")
    exchange(twin.catalog, reference).push(twin.layer, tag="web", replace=True)
    assert [pack.seal for pack in pulled(elsewhere, f"{reference}@{pushed.digest}")] == [home.base.seal, home.layer.seal]


def test_of_two_who_push_packs_of_one_key_the_first_wins(
    home: Home, twin: Twin, elsewhere: Catalog, registry: DockerRegistry, name: str
) -> None:
    reference = f"{registry.host}/{name}"
    exchange(home.catalog, reference).push(home.base)
    with pytest.raises(CatalogError, match="--replace"):
        exchange(twin.catalog, reference).push(twin.layer)
    assert [pack.seal for pack in pulled(elsewhere, f"{reference}:pack-{home.base.key}")] == [home.base.seal]
    # What stands on the other base comes with that one.
    exchange(twin.catalog, reference).push(twin.layer, replace=True)
    assert [pack.seal for pack in pulled(elsewhere, f"{reference}:pack-{twin.layer.key}")] == [twin.base.seal, twin.layer.seal]


def test_a_pull_that_is_cut_off_goes_on_where_it_ended(home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str) -> None:
    here = exchange(home.catalog, f"{registry.host}/{name}")
    pushed, image = here.push(home.base), here.push_image(ImageStore(home.catalog.images).list()[0])
    with cut_off(registry, 1 << 10, 1 << 18, image.size, pushed.size // 2) as (host, sent):
        (base,) = pulled(elsewhere, f"{host}/{name}:pack-{home.base.key}")
    base.verify()
    assert image.size + pushed.size <= sum(sent) < image.size + pushed.size + (3 << 16)
    assert len(sent) == 5


def test_a_pull_that_is_given_up_goes_on_the_next_time(home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str) -> None:
    pushed = exchange(home.catalog, f"{registry.host}/{name}").push(home.base)
    with cut_off(registry, *[1 << 10] * 20) as (host, sent), pytest.raises(RegistryError, match="Try again"):
        pulled(elsewhere, f"{host}/{name}:pack-{home.base.key}")
    assert not packs.scan(elsewhere.packs)[0]
    with cut_off(registry) as (host, again):
        pulled(elsewhere, f"{host}/{name}:pack-{home.base.key}")[0].verify()
    assert sum(sent) + sum(again) - pushed.size < pushed.size


def test_other_content_than_the_digest_says_is_refused_and_deleted(home: Home, elsewhere: Catalog, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    with docker_registry(folder) as registry:
        pushed = exchange(home.catalog, f"{registry.host}/packs").push(home.base)
        blob = registry.blobs[pushed.blob]
        content = bytearray(blob.read_bytes())
        content[random.randrange(len(content))] ^= 1
        blob.write_bytes(content)
        with pytest.raises(RegistryError, match="other content"):
            pulled(elsewhere, f"{registry.host}/packs@{pushed.digest}")
    assert not packs.scan(elsewhere.packs)[0]
    assert not [path for path in elsewhere.root.glob("downloads/*") if pushed.blob[7:] in path.name]


class _Liar(BaseHTTPRequestHandler):
    answer: bytes

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"layers": []}',
        b'{"layers": [{"mediaType": "application/vnd.pytest-vmbottle.v1+zip", "digest": "sha256:../../x", "size": 1}], "annotations": {}}',
        b'{"layers": [{"mediaType": "application/vnd.pytest-vmbottle.v1+zip", "digest": "sha256:%s", "size": 1}], "annotations": {}}'
        % (b"0" * 64),
        b"x" * (5 << 20),
    ],
    ids=["nothing", "empty", "nested", "no layer", "a path", "no annotations", "long"],
)
@pytest.mark.parametrize("which", ["web", f"sha256:{'0' * 64}"])
def test_a_registry_that_sends_something_else_is_refused(elsewhere: Catalog, answer: bytes, which: str) -> None:
    liar = type("Bound", (_Liar,), {"answer": answer})
    with served(ThreadingHTTPServer(("127.0.0.1", 0), liar)) as server, pytest.raises(RegistryError):
        exchange(elsewhere, f"127.0.0.1:{server.server_address[1]}/packs").pull(which)


def test_what_is_not_there_and_what_is_another_kind_is_told(home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str) -> None:
    reference = f"{registry.host}/{name}"
    with pytest.raises(CatalogError, match="no pack web"):
        pulled(elsewhere, f"{reference}:web")
    exchange(home.catalog, reference).push(home.base, tag="base")
    with pytest.raises(CatalogError, match="no image base"):
        exchange(elsewhere, reference).pull_image("base")


def test_a_pack_of_another_computer_is_refused(home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str) -> None:
    exchange(home.catalog, f"{registry.host}/{name}").push(home.base, tag="base")
    other = attrs.evolve(exchange(elsewhere, f"{registry.host}/{name}"), fingerprint=lambda _: "another")
    with pytest.raises(CatalogError, match="cannot be restored here"):
        other.pull("base")


def test_an_image_is_found_by_its_name_architecture_and_recipe(home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str) -> None:
    (image,) = ImageStore(home.catalog.images).list()
    here, there = (exchange(each, f"{registry.host}/{name}") for each in (home.catalog, elsewhere))
    here.push_image(image)
    assert there.pull_image(image_tag("debian-12")).key == image.key
    assert there.pull_image("", name="debian-12").key == image.key
    assert image_tag("debian-12") != image_tag("debian-13").replace("13", "12")


def test_a_registry_with_passwords_wants_the_login_that_docker_stored(
    home: Home, elsewhere: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "registry", tmp_path / "docker"
    folder.mkdir()
    config.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    with docker_registry(folder, auth=passwords(folder)) as registry:
        with pytest.raises(RegistryError, match=f"docker login {registry.host}"):
            exchange(home.catalog, f"{registry.host}/packs").push(home.base)
        log_in(config, registry.host)
        exchange(home.catalog, f"{registry.host}/packs").push(home.layer, tag="web")
        assert len(pulled(elsewhere, f"{registry.host}/packs:web")) == 2


def test_logins_that_cannot_be_read_are_told_without_a_traceback(
    elsewhere: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    for text in ("{", "[]", '{"auths": 5}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RegistryError, match=r"config\.json"):
            exchange(elsewhere, "127.0.0.1:1/packs")


@pytest.mark.parametrize("words", ["Negotiate", 'Bearer realm="ftp://x"', 'Bearer service="x"', ""])
def test_a_registry_that_wants_a_login_of_another_kind_is_told_as_a_refusal(elsewhere: Catalog, words: str) -> None:
    class Refusing(_Liar):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", words)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with served(ThreadingHTTPServer(("127.0.0.1", 0), Refusing)) as server, pytest.raises(RegistryError, match="docker login"):
        exchange(elsewhere, f"127.0.0.1:{server.server_address[1]}/packs").pull("web")


class _Storage(BaseHTTPRequestHandler):
    """Host that a registry sends uploads and downloads to; it wants a login of its own, and would take any."""

    wanted: str
    asked: list[tuple[str, str | None]]
    """Paths of requests, and the logins that came with them."""

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.answer(401, {"WWW-Authenticate": self.wanted.format(host=self.headers["Host"])})

    def do_PUT(self) -> None:
        self.do_GET()

    def answer(self, status: int, headers: Mapping[str, str] = {}, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Sending(_Storage):
    """Registry that has nothing itself."""

    storage: str
    manifest = json.dumps(
        {
            "layers": [{"mediaType": "application/vnd.pytest-vmbottle.v1+zip", "digest": f"sha256:{'0' * 64}", "size": 1}],
            "annotations": {"pytest-vmbottle.key": "0" * 64},
        }
    ).encode()

    def do_GET(self) -> None:
        if self.headers["Authorization"] is None:
            super().do_GET()
        elif self.command == "POST":
            self.answer(202, {"Location": f"http://{self.storage}/upload?id=1"})
        elif self.command == "GET" and "/blobs/" in self.path:
            self.answer(307, {"Location": f"http://{self.storage}/blob?id=1"})
        elif self.path.endswith("/manifests/web"):
            self.answer(200, body=self.manifest)
        else:
            self.answer(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()


@pytest.mark.parametrize("wanted", ['Basic realm="x"', 'Bearer realm="http://{host}/token",service="x"'])
@pytest.mark.parametrize("what", ["upload", "download"])
def test_a_storage_that_a_registry_sends_to_never_gets_the_login(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, what: str
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    asked: list[tuple[str, str | None]] = []
    storing = type("Bound", (_Storage,), {"wanted": wanted, "asked": asked})
    with served(ThreadingHTTPServer(("127.0.0.1", 0), storing)) as storage:
        sending = type(
            "Bound", (_Sending,), {"wanted": 'Basic realm="x"', "asked": [], "storage": f"127.0.0.1:{storage.server_address[1]}"}
        )
        with served(ThreadingHTTPServer(("127.0.0.1", 0), sending)) as registry:
            host = f"127.0.0.1:{registry.server_address[1]}"
            log_in(tmp_path, host)
            with pytest.raises(RegistryError, match=f"does not allow to {what}"):
                pulled(home.catalog, f"{host}/packs:web") if what == "download" else exchange(home.catalog, f"{host}/packs").push(home.base)
    assert asked
    assert {login for _, login in asked} == {None}


def test_who_has_a_token_for_reading_pulls_and_is_told_that_he_cannot_push(home: Home, elsewhere: Catalog, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    with token_server(folder, writers=True) as auth, docker_registry(folder, auth=auth) as registry:
        exchange(home.catalog, f"{registry.host}/packs").push(home.base, tag="base")
    with token_server(folder, writers=False) as auth, docker_registry(folder, auth=auth) as registry:
        assert len(pulled(elsewhere, f"{registry.host}/packs:base")) == 1
        began = time.monotonic()
        with pytest.raises(RegistryError, match="does not allow to upload"):
            exchange(home.catalog, f"{registry.host}/packs").push(home.layer)
        assert time.monotonic() - began < 30


def test_a_registry_elsewhere_is_asked_over_tls_and_must_be_trusted(
    home: Home, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    # As if it were not on this computer.
    monkeypatch.setattr(module, "_is_loopback", lambda _: False)
    with docker_registry(folder, tls=authority.server) as registry:
        with pytest.raises(RegistryError, match="certificate"):
            exchange(home.catalog, f"{registry.host}/packs").push(home.base)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
        exchange(home.catalog, f"{registry.host}/packs").push(home.base)
        assert registry.blobs


@pytest.mark.parametrize(
    "text", ["packs", "host.example", "https://host.example/packs", "host.example/Packs", "host.example/a@sha256:1", "h/a:b c"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="HOST/NAME"):
        Reference.parse(text)


# -- a run with a registry ---------------------------------------------------------------------------------------------------------------


def run_registry(there: Catalog, reference: str, *, push: bool = True) -> tuple[RunRegistry, list[str]]:
    warnings: list[str] = []
    return RunRegistry(exchange(there, reference), push=push, replace=False, warn=warnings.append), warnings


def test_a_run_pushes_what_it_made_and_another_one_pulls_it(home: Home, elsewhere: Catalog, registry: DockerRegistry, name: str) -> None:
    here, warnings = run_registry(home.catalog, f"{registry.host}/{name}")
    (image,) = ImageStore(home.catalog.images).list()
    assert here.push_pack(home.base)
    assert here.push_pack(home.layer)
    there, more = run_registry(elsewhere, f"{registry.host}/{name}", push=False)
    came = there.pull_image("debian-12")
    assert came is not None
    assert (came.key, came.description, came.traits) == (image.key, image.description, image.traits)
    assert [there.pull_pack(pack.key) for pack in (home.base, home.layer)] == [True, True]
    assert not there.pull_pack("0" * 64)
    assert not there.push_pack(home.base)
    assert warnings == more == []


def test_a_run_goes_on_without_a_registry_that_cannot_be_reached_and_says_so_once(home: Home) -> None:
    here, warnings = run_registry(home.catalog, "127.0.0.1:1/packs")
    for _ in range(3):
        assert not here.pull_pack(home.base.key)
        assert not here.push_pack(home.base)
    (warning,) = warnings
    assert "127.0.0.1:1/packs: Connection refused." in warning


def test_a_run_whose_pack_others_have_made_as_well_goes_on_with_its_own(
    home: Home, twin: Twin, registry: DockerRegistry, name: str
) -> None:
    exchange(home.catalog, f"{registry.host}/{name}").push(home.layer)
    there, warnings = run_registry(twin.catalog, f"{registry.host}/{name}")
    assert not there.push_pack(twin.layer)
    assert len(warnings) == 1
    assert not there.pull_pack("0" * 64)
    assert len(warnings) == 1
