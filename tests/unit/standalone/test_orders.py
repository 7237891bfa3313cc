"""Orders for machines: sources by their text, names, and what is refused before anything is made."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_vmbottle import MachineSpec
from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.spec import Layer
from pytest_vmbottle.standalone.orders import Order, forwards, free_name, new_order, source_of, spec_keywords

LAYERS = """
from beside import MEMORY
from pytest_vmbottle import layer

@layer("debian-12", memory=MEMORY)
def web(vm):
    vm.exec("true")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(LAYERS)
    (folder / "beside.py").write_text("MEMORY = '2G'\n")
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def order(folder: Path, source: str, *, name: str | None = None, **keywords: Any) -> Order:
    return new_order(folder / "machines", catalog=folder, source=source, name=name, keywords=keywords, settings={}, folder=folder)


def test_a_layer_is_found_in_its_file_with_what_that_imports_beside_it(project: Path) -> None:
    found = source_of("tests/conftest.py::web", project)

    assert isinstance(found, Layer)
    assert MachineSpec.resolve(found, {}).memory == 2 << 30


@pytest.mark.parametrize(
    ("source", "word"),
    [("tests/conftest.py::wbe", "web"), ("tests/none.py::web", "no such file"), ("tests/broken.py::web", "ZeroDivisionError")],
)
def test_a_layer_that_is_not_there_is_told_with_those_that_are(project: Path, source: str, word: str) -> None:
    (project / "tests" / "broken.py").write_text("1 / 0\n")
    with pytest.raises(SpecError, match=word):
        order(project, source)


def test_a_layer_and_a_disk_are_named_so_that_they_are_found_from_every_folder(project: Path) -> None:
    (project / "disk.qcow2").touch()

    assert order(project, "tests/conftest.py::web").facts["keywords"]["source"] == f"{project}/tests/conftest.py::web"
    assert order(project, "./disk.qcow2").facts["keywords"]["source"] == str(project / "disk.qcow2")
    assert order(project, "debian-12").facts["keywords"]["source"] == "debian-12"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("debian-12", "debian-12"),
        ("./images/web.qcow2", "web"),
        ("tests/conftest.py::web", "web"),
        ("web@clean", "web"),
        ("pack:4f1d", "vm-4f1d"),
        ("library/alpine:3", "vm-3"),
    ],
)
def test_a_machine_is_named_after_its_source(tmp_path: Path, source: str, name: str) -> None:
    assert free_name(tmp_path, source) == name
    (tmp_path / name).mkdir()
    assert free_name(tmp_path, source) == f"{name}-2"


@pytest.mark.parametrize("name", ["", "../web", "a/b", "-web", "w" * 42])
def test_a_name_that_is_no_name_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="name"):
        order(tmp_path, "debian-12", name=name)


def test_all_mistakes_in_keywords_are_told_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"(?s)memory.*cpus"):
        order(tmp_path, "debian-12", memory="much", cpus=0)
    assert list(tmp_path.iterdir()) == []


def test_a_pack_and_a_snapshot_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="pack"):
        order(tmp_path, "pack:4f1d")
    with pytest.raises(CatalogError, match="web"):
        order(tmp_path, "web@clean")


def test_files_have_their_content_as_text_as_base64_or_from_the_host() -> None:
    files = {"/a": {"text": "x"}, "/b": {"b64": "AAE=", "mode": 0o755}, "/c": {"host": "/etc/hostname"}}

    assert spec_keywords({"files": files})["files"] == {"/a": "x", "/b": (b"\x00\x01", 0o755), "/c": Path("/etc/hostname")}


def test_a_port_may_have_the_port_of_this_computer_beside_it() -> None:
    given = {"ports": [22, [80, 8080]]}

    assert spec_keywords(given)["ports"] == [22, 80]
    assert forwards(given) == [(80, 8080)]
    with pytest.raises(SpecError, match="ports"):
        MachineSpec(source="debian-12", **spec_keywords({"ports": [[80, 8080, 1]]}))


@pytest.mark.parametrize("content", ["x", {}, {"text": "x", "b64": "eA=="}, {"b64": "?"}, {"b64": 1}])
def test_a_file_without_a_content_that_can_be_read_is_refused(content: object) -> None:
    with pytest.raises(SpecError, match="files"):
        spec_keywords({"files": {"/a": content}})
