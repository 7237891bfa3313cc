"""The application on a catalog without running machines: routes, refusals, and its document."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from pytest_vmbottle.host.files import private_dir
from pytest_vmbottle.service.app import make_app, openapi_of
from pytest_vmbottle.service.options import Options
from pytest_vmbottle.service.schema import NewMachine
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.standalone.record import Record
from tests.unit.service.asgi import TOKEN, Answer, call


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(root=tmp_path / "catalog", token=TOKEN, node="here", folder=tmp_path)


@pytest.fixture
def kept(options: Options) -> Path:
    """Folder of a machine that was stopped."""
    folder = private_dir(options.root / "machines" / "web")
    spec = {"arch": "x86_64", "cpus": 2, "memory": 1 << 30, "disk": 3 << 29, "network": False, "user": "root"}
    Record(name="web", source="debian-12", state="stopped", reason="it was shut down as asked", since=7.0, spec=spec).write(
        folder / "record.json"
    )
    (folder / "console.log").write_text("one\ntwo\x1b[31m\nthree\n")
    return folder


def ask(options: Options, path: str, method: str = "GET", body: Any = None) -> Answer:
    return call(make_app(options), path, method, body=body)


@pytest.mark.usefixtures("kept")
def test_machines_are_what_their_folders_say(options: Options) -> None:
    shown = ask(options, "/vms/web").json

    assert ask(options, "/vms/").json == ask(options, "/vms/list/web").json == [shown]
    known = {
        "id": "web",
        "name": "web",
        "state": "stopped",
        "reason": "it was shut down as asked",
        "node": "here",
        "base_image": "debian-12",
    }
    size = {"arch": "x86_64", "vcpus": 2, "mem_mib": 1024, "disk_gib": 1.5, "user": "root"}
    assert shown == known | size | {"since": 7.0, "until": None, "backend": "", "pid": None, "ports": {}}


def test_a_machine_whose_daemon_died_is_told_so(options: Options, kept: Path) -> None:
    record = Record.read(kept / "record.json")
    attrs.evolve(record, state="running", reason="").write(kept / "record.json")

    assert (ask(options, "/vms/web").json["state"], ask(options, "/vms/web").json["reason"]) == (
        "stopped",
        "its daemon died, and the machine with it",
    )


def test_an_empty_catalog_is_no_error_and_is_not_made(options: Options) -> None:
    assert (ask(options, "/vms/").json, options.root.exists()) == ([], False)


def test_health_tells_version_and_node(options: Options) -> None:
    answer = call(make_app(options), "/health", headers={"x": "y"})

    assert (answer.status, answer.json["ok"], answer.json["node"]) == (200, True, "here")


@pytest.mark.usefixtures("kept")
def test_the_console_of_a_machine_that_is_off_can_be_read(options: Options) -> None:
    answer = ask(options, "/vms/web/console/tail?lines=2")

    assert (answer.body, answer.headers["content-type"]) == (b"two\\x1b[31m\nthree", "text/plain; charset=utf-8")


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/vms/nobody", None, 404, "there is no machine 'nobody'"),
        ("GET", "/vms/list/web,nobody", None, 404, "nobody"),
        ("DELETE", "/vms/nobody", None, 404, "nobody"),
        ("GET", "/nothing", None, 404, "Not Found"),
        ("PATCH", "/vms/web", None, 405, "Method Not Allowed"),
        ("GET", "/vms/..", None, 422, "path.id"),
        ("GET", "/vms/%2e%2e", None, 422, "path.id"),
        ("POST", "/vms/", b"{", 422, "body"),
        ("POST", "/vms/", {}, 422, "base_image"),
        ("POST", "/vms/", {"base_image": "../disk.qcow2"}, 422, "base_image"),
        ("POST", "/vms/", {"base_image": "layers.py::web"}, 422, "base_image"),
        ("POST", "/vms/", {"base_image": "debian-12", "netwerk": True}, 422, "did you mean 'network'"),
        ("POST", "/vms/", {"base_image": "debian-12", "vcpus": 2, "cpus": 2}, 422, "mean the same"),
        ("POST", "/vms/", {"base_image": "debian-12", "source": "x"}, 422, "base_image"),
        ("POST", "/vms/", {"base_image": "debian-12", "files": {"/x": {"host": "/etc/shadow"}}}, 422, "takes text or b64"),
        ("POST", "/vms/", {"base_image": "debian-12", "name": "web"}, 409, "already"),
        ("POST", "/vms/web/actions", {"action": "jump"}, 422, "action"),
        ("POST", "/vms/web/actions", {"action": "snapshot"}, 422, "takes a label"),
        ("POST", "/vms/web/actions", {"action": "reboot", "now": True}, 422, "neither"),
        ("POST", "/vms/web/actions", {"action": "start"}, 409, "no disk of its own"),
        ("POST", "/vms/web/actions", {"action": "pause"}, 409, "not running"),
        ("POST", "/vms/web/execute-sh", {"command": "true"}, 409, "not running"),
        ("POST", "/vms/web/execute-sh", {"command": "true", "argv": ["true"]}, 422, "either command or argv"),
        ("POST", "/vms/web/execute-sh", {"argv": ["a\0b"]}, 422, "NUL"),
        ("POST", "/vms/web/read-file", {"paths": ["relative"]}, 422, "paths"),
        ("POST", "/vms/web/upload-files", {"dest_path": "/srv", "files": [{"path": "x"}]}, 422, "either text or content_b64"),
        ("GET", "/vms/web/download-file?path=/etc/hosts", None, 409, "not running"),
        ("PUT", "/vms/web/files?path=/x", b"data", 409, "not running"),
        ("GET", "/metrics/web", None, 409, "not running"),
        ("GET", "/vms/web/console/tail?lines=0", None, 422, "lines"),
        ("DELETE", "/vms/web/snapshots/none", None, 404, "no snapshot 'none'"),
        ("GET", "/page/none.js", None, 404, "no such file"),
    ],
)
def test_refusals_are_problems_in_our_words(  # noqa: PLR0917 - a request and its answer
    options: Options, method: str, path: str, body: Any, status: int, words: str
) -> None:
    answer = ask(options, path, method, body)

    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer
    assert answer.json["status"] == status
    assert words in answer.json["detail"]


def test_json_that_is_none_is_a_bad_request(options: Options) -> None:
    from tests.unit.service.asgi import BEARER

    answer = call(make_app(options), "/vms/", "POST", body=b"{", headers={**BEARER, "Content-Type": "application/json"})

    assert answer.status == 400


def test_a_removed_machine_is_gone(options: Options, kept: Path) -> None:
    assert ask(options, "/vms/web", "DELETE").status == 204
    assert not kept.exists()


def test_too_many_machines_are_refused(options: Options, kept: Path) -> None:
    assert kept.exists()
    answer = ask(attrs.evolve(options, max_machines=1), "/vms/", "POST", {"base_image": "debian-12"})

    assert (answer.status, "no more are made" in answer.json["detail"]) == (409, True)


@pytest.mark.usefixtures("kept")
def test_what_makes_a_machine_start_is_neither_of_another_file_nor_of_another_folder(options: Options) -> None:
    (options.folder / "debian-12").mkdir()
    answer = ask(options, "/vms/", "POST", {"base_image": "catalog/machines"})

    assert answer.status == 422


# -- pages -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_pages_load_nothing_from_elsewhere_and_all_that_they_load_is_there(options: Options, path: str) -> None:
    page = ask(options, path)
    text = page.body.decode()
    loaded = re.findall(r'(?:src|href)="(/page/[^"]+)"', text)
    policy = page.headers["content-security-policy"]

    assert "default-src 'self'; script-src 'self'" in policy
    assert "unsafe-eval" not in policy
    assert loaded
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|https?://|style=", text)
    while loaded:
        file = ask(options, loaded.pop())
        assert file.status == 200
        assert file.headers["content-type"].startswith(("text/css", "text/javascript"))
        loaded += re.findall(r'^import .* from "(/page/[^"]+)"', file.body.decode(), re.MULTILINE)


def test_libraries_of_the_pages_come_with_their_licences(options: Options) -> None:
    for name in ("xterm", "addon-fit", "uPlot"):
        assert b"Permission is hereby granted" in ask(options, f"/page/{name}.LICENSE.txt").body


# -- the document ----------------------------------------------------------------------------------------------------------------------


def test_the_document_has_names_of_its_own_and_every_refusal(options: Options) -> None:
    document = openapi_of(options)
    schemas = document["components"]["schemas"]
    operations = {(path, method): operation for path, methods in document["paths"].items() for method, operation in methods.items()}

    assert {"Machine", "NewMachine", "Action", "Problem", "Upload", "Command", "Execution", "Metrics"} <= schemas.keys()
    assert not any(name.startswith(("HTTP", "Body_", "Validation")) for name in schemas)
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    for (path, _), operation in operations.items():
        assert operation["summary"]
        assert {"401", "404", "409", "413", "422", "429"} <= operation["responses"].keys() or path == "/health"
    assert '"HTTPValidationError"' not in json.dumps(document)


def test_every_keyword_of_the_mark_can_be_given() -> None:
    own = {"base_image": "source", "vcpus": "cpus", "mem_mib": "memory", "disk_gib": "disk", "timeout_boot_s": "timeout", "name": "name"}
    keywords = {field.name for field in attrs.fields(MachineSpec)}

    assert {own[name] for name in NewMachine.model_fields} <= keywords
    assert NewMachine.model_validate({"base_image": "x"} | dict.fromkeys(keywords - set(own.values()), 1)).model_extra


def test_every_schema_of_a_request_has_an_example(options: Options) -> None:
    document = openapi_of(options)
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for methods in document["paths"].values()
        for operation in methods.values()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]

    assert len(bodies) >= 8
    assert [name for name in bodies if not document["components"]["schemas"][name].get("examples")] == []
