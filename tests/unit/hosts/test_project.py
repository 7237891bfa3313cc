"""The archive by which a project comes to a host."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

from pytest_vmbottle.hosts.project import write_archive


def _archived(root: Path, *without: Path) -> tuple[tarfile.TarFile, int]:
    stream = io.BytesIO()
    size = write_archive(root, stream, without=without)
    return tarfile.open(fileobj=io.BytesIO(stream.getvalue())), size


def test_an_archive_has_the_files_of_a_project_with_their_rights_and_links(tmp_path: Path) -> None:
    root = tmp_path / "it"
    (root / "tests").mkdir(parents=True)
    (root / "tests" / "tool.sh").write_text("true\n")
    (root / "tests" / "tool.sh").chmod(0o750)
    (root / "link").symlink_to("tests/tool.sh")
    found, size = _archived(root)

    assert found.getnames() == ["it", "it/link", "it/tests", "it/tests/tool.sh"]
    assert found.getmember("it/tests/tool.sh").mode == 0o750
    assert found.getmember("it/link").linkname == "tests/tool.sh"
    assert size == 5


def test_an_archive_leaves_out_caches_environments_and_what_no_file_can_hold(tmp_path: Path) -> None:
    for name in (".git", "a/__pycache__", "env", "old-artifacts", ".pytest_cache"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "env" / "pyvenv.cfg").touch()
    # A relative path, because that of a socket may have 107 bytes only.
    here = Path.cwd()
    os.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        os.chdir(here)
        found, _ = _archived(tmp_path, tmp_path / "old-artifacts")

    # The last failures are in pytest's cache.
    assert [name.partition("/")[2] for name in found.getnames()] == ["", ".pytest_cache", "a"]
