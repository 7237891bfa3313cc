"""The `vmbottle` command on catalogs of its own; the packs in them were made by a backend that runs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import click
import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle import Machine, layer
from pytest_vmbottle.catalog import packs
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.deadline import Deadline
from pytest_vmbottle.host.files import size_on_disk
from pytest_vmbottle.host.locks import try_lock
from pytest_vmbottle.images import Image, ImageStore
from pytest_vmbottle.provision import Provisioner, Settings
from pytest_vmbottle.spec import MachineSpec
from pytest_vmbottle.standalone.client import Kept
from pytest_vmbottle.standalone.record import Record
from pytest_vmbottle.testing import FakeBackend

GROUPS = ("image", "pack", "machine")
DAY = 86400.0


def names(group: str) -> list[str]:
    """The commands of a group."""
    found = main.get_command(click.Context(main), group)
    assert isinstance(found, click.Group)
    return found.list_commands(click.Context(found))


# As a shell starts it, whatever the process that runs these tests does with the signal.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from pytest_vmbottle.cli import main
main(prog_name="vmbottle")
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalog that the command uses."""
    folder = tmp_path / "catalog"
    monkeypatch.setenv("VMBOTTLE_CATALOG", str(folder))
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file that looks like a disk."""
    content = bytearray(1 << 20)
    content[510:512] = b"\x55\xaa"
    path = tmp_path / "disk.raw"
    path.write_bytes(content)
    return path


def rewrite(pack: packs.Pack, **changes: Any) -> None:
    """Publishes a pack with another manifest."""
    path = pack.path / "pack.json"
    path.unlink()
    packs.seal(pack.path, attrs.evolve(pack.manifest, **changes))


@attrs.frozen
class Stock:
    """A catalog with three packs: `web` and `db` stand on `base`; and what still uses them all."""

    catalog: Catalog
    user: Provisioner
    base: packs.Pack
    web: packs.Pack
    db: packs.Pack

    def age(self, pack: packs.Pack, days: float) -> None:
        """Makes a pack look as if it had been made days ago."""
        rewrite(pack, created=pack.manifest.created - days * DAY)

    def there(self) -> set[str]:
        return {path.name for path in self.catalog.packs.iterdir()}


@pytest.fixture
def used(root: Path, disk: Path) -> Iterator[Stock]:
    """Packs that a run is using."""

    @layer(disk)
    def web(vm: Machine) -> None:
        vm.exec(["true"])

    @layer(disk)
    def db(vm: Machine) -> None:
        vm.exec(["false"])

    catalog = Catalog(root)
    user = Provisioner(catalog, FakeBackend(), name="fake", settings=Settings())
    base, on_web, on_db = (user.pack(MachineSpec.resolve(source, {})) for source in (disk, web, db))
    yield Stock(catalog, user, base, on_web, on_db)
    user.close()


@pytest.fixture
def stock(used: Stock) -> Stock:
    """The same when the run is over."""
    used.user.close()
    return used


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="vmbottle")


def done(*words: str | Path) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def failed(status: int, *words: str | Path) -> str:
    result = run(*words)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.stderr


# -- the command itself ----------------------------------------------------------------------------------------------------------------


def test_importing_the_command_imports_nothing_that_machines_need() -> None:
    heavy = "{'filelock', 'paramiko', 'psutil', 'qemu', 'asyncio', 'pycdlib', 'pytest'}"
    code = f"import sys, pytest_vmbottle.cli; print(sorted({heavy} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        (),
        *((name,) for name in main.list_commands(click.Context(main)) if name != "serve"),
        *((group, name) for group in GROUPS for name in names(group)),
        ("help",),
    ],
    ids="-".join,
)
def test_every_command_explains_itself_with_examples_and_makes_no_folder(words: tuple[str, ...], root: Path) -> None:
    shown = done(*words, "--help")

    assert re.search(r"Examples:\n\s+vmbottle ", shown)
    assert not root.exists()


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--version", f"python -m pytest_vmbottle, version {version('pytest-vmbottle')}\nCPython "),
        ("--help", "Usage: python -m pytest_vmbottle "),
    ],
    ids=["version", "help"],
)
def test_the_package_runs_as_the_command(option: str, answer: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "pytest_vmbottle", option], capture_output=True, text=True, check=True)

    assert ended.stdout.startswith(answer)
    assert ended.stderr == ""


def test_the_versions_are_those_that_matter_each_on_a_line() -> None:
    ours, python, qemu, system = done("--version").splitlines()

    assert ours == f"vmbottle, version {version('pytest-vmbottle')}"
    assert python == f"CPython {platform.python_version()}, pytest {version('pytest')}"
    assert re.fullmatch(r"QEMU emulator version \d.*, /.*/qemu-system-\w+|no qemu-system-\w+ in the search path", qemu)
    assert system == f"Linux {platform.release()} on {platform.machine()}"


def test_the_versions_are_told_where_qemu_is_missing_or_is_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    name = f"qemu-system-{host_arch()}"

    assert f"\nno {name} in the search path\n" in done("--version")
    (tmp_path / name).write_text("#!/bin/sh\necho toaster\n")
    (tmp_path / name).chmod(0o700)
    assert f"\ntoaster, {tmp_path / name}\n" in done("--version")
    (tmp_path / name).write_text("")
    assert f"\n{name} cannot be run: Exec format error, {tmp_path / name}\n" in done("--version")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("pack", "show"), "Missing argument 'KEY'"),
        (("pack", "lst"), "No such command 'lst'"),
        (("pack", "prune", "--older-than", "week"), "'week'"),
        (("pack", "prune", "--keep-size", "huge"), "'huge'"),
        (("doctor", "--accel", "xen"), "'xen'"),
        (("image", "add", "disk.raw"), "Missing option '--name'"),
    ],
)
@pytest.mark.usefixtures("root")
def test_a_wrong_call_is_told_and_ends_with_status_2(words: tuple[str, ...], told: str) -> None:
    assert told in failed(2, *words)


def test_a_catalog_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    told = failed(1, "--catalog", tmp_path / "file", "pack", "ls")
    assert str(tmp_path / "file") in told
    assert told.count("\n") == 1


def test_the_option_goes_before_the_environment(root: Path, tmp_path: Path, disk: Path) -> None:
    done("--catalog", tmp_path / "other", "image", "add", disk, "--name", "mine")

    assert (tmp_path / "other").is_dir()
    assert not root.exists()


# -- doctor ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("root")
def test_the_doctor_ends_with_status_3_where_no_machine_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("doctor")

    assert result.exit_code == 3
    assert re.search(r"^missing +qemu +qemu-system-.*\n +sudo apt-get install qemu", result.stdout, re.MULTILINE)
    assert result.stderr


@pytest.mark.usefixtures("root")
def test_the_doctor_writes_json_whatever_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("doctor", "--json")
    found = {each["topic"]: each for each in json.loads(result.stdout)}

    assert result.exit_code == 3
    assert found["qemu"]["state"] == "missing"
    assert found["qemu"]["remedy"].startswith("sudo apt-get install")
    assert set(found["catalog"]) == {"topic", "state", "text", "remedy", "details"}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RUN_AS", "root", "--run-as: 'root' is root, or root's group"),
        ("ACCEL", "xen", "'xen'"),
        ("PACK", "ram", "--pack takes auto or template or stream or disk, not 'ram'"),
        ("MEMORY_BUDGET", "lots", "--memory-budget: 'lots' is not a size"),
        ("TIMEOUT_FACTOR", "much", "--timeout-factor takes a number above 0, not 'much'"),
    ],
)
@pytest.mark.usefixtures("root")
def test_the_doctor_refuses_a_wrong_setting_as_other_commands_do(
    name: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"VMBOTTLE_{name}", value)

    for words in (("doctor",), ("machine", "start", "debian-12")):
        assert told in failed(2, *words)
    assert not (tmp_path / "catalog").exists()


@pytest.mark.usefixtures("root")
def test_the_doctor_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name, value in {"RUN_AS": "4711:4711", "ACCEL": "tcg", "MEMORY_BUDGET": "3G", "BACKEND": "smolvm"}.items():
        monkeypatch.setenv(f"VMBOTTLE_{name}", value)
    found = {each["topic"]: each for each in json.loads(run("doctor", "--json").stdout)}

    assert found["rights"]["details"]["run_as"] == "4711:4711"
    assert found["accelerator"]["details"]["wanted"] == "tcg"
    assert found["memory"]["details"]["budget"] == 3 << 30
    assert found["smolvm"]["state"] == "missing"


# -- images ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("root")
def test_an_image_is_added_listed_verified_and_removed(disk: Path) -> None:
    digest = sha256(disk.read_bytes()).hexdigest()

    assert done("image", "add", disk, "--name", "mine", "--sha256", digest) == f"mine {digest}\n"
    (record,) = json.loads(done("image", "ls", "--json"))
    assert (record["name"], record["sha256"], record["format"], record["virtual_size"]) == ("mine", digest, "raw", 1 << 20)
    assert re.search(rf"^mine +{digest[:12]} ", done("image", "ls"), re.MULTILINE)
    assert done("image", "verify") == "ok  mine\n"
    assert "mine" in run("image", "rm", "mine").stderr
    assert json.loads(done("image", "ls", "--json")) == []
    assert "vmbottle image build" in run("image", "ls").stderr


def test_a_file_that_is_no_disk_is_not_added(root: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("milk, eggs")

    assert "notes.txt" in failed(1, "image", "add", tmp_path / "notes.txt", "--name", "mine")
    assert "No such file" in failed(1, "image", "add", tmp_path / "gone", "--name", "mine")
    assert json.loads(done("image", "ls", "--json")) == []
    assert not list((root / "images" / "sha256").iterdir())


@pytest.mark.usefixtures("root")
def test_what_a_disk_does_not_tell_is_said_when_it_is_added_and_listed(disk: Path) -> None:
    done("image", "add", disk, "--name", "mine", "--arch", "aarch64", "--user", "admin", "--ready-when", "channel")
    (record,) = json.loads(done("image", "ls", "--json"))
    assert {key: record[key] for key in ("arch", "firmware", "user", "readiness", "prepared")} == {
        "arch": "aarch64",
        "firmware": "uefi",
        "user": "admin",
        "readiness": "channel",
        "prepared": False,
    }


def test_a_kernel_is_added_beside_its_disk_and_not_without_a_command_line(disk: Path, root: Path, tmp_path: Path) -> None:
    for part in ("vmlinuz", "initrd"):
        (tmp_path / part).write_text(part)
    beside = ("--kernel", tmp_path / "vmlinuz", "--initrd", tmp_path / "initrd")

    assert "root=" in failed(1, "image", "add", disk, "--name", "mine", *beside)
    done("image", "add", disk, "--name", "mine", *beside, "--cmdline", "root=/dev/vda")

    assert (next(root.glob("images/sha256/*/initrd.img"))).read_text() == "initrd"
    assert (next(root.glob("images/sha256/*/vmlinuz"))).read_text() == "vmlinuz"


@pytest.mark.parametrize("sides", [("", "web:/srv"), ("web:/srv", ""), ("", "")])
def test_a_copy_of_which_a_side_is_empty_is_a_usage_error(root: Path, sides: tuple[str, str]) -> None:
    result = run("machine", "cp", *sides)

    assert result.exit_code == 2
    assert "empty" in result.output
    assert not root.exists()


def test_a_user_that_cannot_be_one_is_a_usage_error(disk: Path) -> None:
    assert "'a b'" in failed(2, "image", "add", disk, "--name", "mine", "--user", "a b")


def test_an_image_with_another_digest_is_not_added(disk: Path) -> None:
    assert "0" * 64 in failed(1, "image", "add", disk, "--name", "mine", "--sha256", "0" * 64)


@pytest.mark.usefixtures("root")
def test_an_image_that_is_not_there_cannot_be_removed_and_is_guessed_at(disk: Path) -> None:
    done("image", "add", disk, "--name", "debian")

    assert "'debian'" in failed(1, "image", "rm", "debain")
    assert "'debian'" in run("image", "verify", "debain").stderr


def test_a_changed_image_is_bad_and_the_others_are_still_checked(root: Path, disk: Path) -> None:
    done("image", "add", disk, "--name", "first")
    disk.write_bytes(disk.read_bytes()[:-1] + b"\x01")
    done("image", "add", disk, "--name", "second")
    stored = ImageStore(root / "images").get("first")
    assert stored is not None
    stored.disk.chmod(0o600)
    with stored.disk.open("r+b") as file:
        file.seek(4096)
        file.write(b"x")
    result = run("image", "verify")

    assert result.exit_code == 1
    assert result.stdout == "bad first\nok  second\n"
    assert "'first'" in result.stderr
    assert "1 of 2" in result.stderr


def test_a_damaged_image_does_not_hide_the_others(root: Path, disk: Path) -> None:
    done("image", "add", disk, "--name", "mine")
    (root / "images" / "names" / "broken.json").write_text("{")
    result = run("image", "ls")

    assert result.exit_code == 0
    assert re.search(r"^broken +damaged", result.stdout, re.MULTILINE)
    assert re.search(r"^mine +[0-9a-f]{12} ", result.stdout, re.MULTILINE)
    assert "vmbottle image rm broken" in result.stderr


@pytest.mark.usefixtures("root")
def test_a_recipe_that_does_not_exist_is_refused() -> None:
    assert "'plan-9'" in failed(1, "image", "build", "plan-9")


def test_a_name_that_is_a_path_is_refused_before_anything_is_locked(root: Path) -> None:
    assert "'../../etc/x'" in failed(1, "image", "build", "debian-12", "--name", "../../etc/x")
    assert not (root / "locks").exists()


@pytest.mark.usefixtures("root")
def test_building_where_the_tools_are_missing_says_what_to_install_and_ends_with_status_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert re.search(r"sudo apt-get install .*mmdebstrap", failed(3, "image", "build", "debian-12"))


@attrs.frozen
class Builder:
    """`vmbottle image build debian-12` that waits for a lock, and has no tools to build with."""

    process: subprocess.Popen[str]
    lock: ExitStack

    def let_go(self) -> tuple[str, str]:
        """Frees the lock; what the command writes from then on."""
        self.lock.close()
        return self.process.communicate(timeout=60)

    def signal(self, number: int) -> tuple[str, str]:
        """Sends a signal; what the command writes from then on."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)


@pytest.fixture
def builder(root: Path, tmp_path: Path) -> Iterator[Builder]:
    with ExitStack() as lock:
        lock.enter_context(Catalog(root).lock("image-debian-12", deadline=Deadline(10), waiting=print))
        argv = [sys.executable, "-c", COMMAND, "image", "build", "debian-12"]
        environment = {**os.environ, "PATH": str(tmp_path)}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stderr is not None
            assert str(os.getpid()) in process.stderr.readline()
            yield Builder(process, lock)
            process.kill()


def published(root: Path, disk: Path, description: str) -> str:
    return ImageStore(root / "images").add(disk, name="debian-12", description=description).sha256


def test_two_builds_of_an_image_at_once_build_it_once(builder: Builder, root: Path, disk: Path) -> None:
    digest = published(root, disk, "Debian 12 (bookworm)")

    assert builder.let_go() == (f"debian-12 {digest}\n", "")
    assert builder.process.returncode == 0


def test_an_image_with_other_packages_is_not_taken_for_the_one_that_was_waited_for(builder: Builder, root: Path, disk: Path) -> None:
    published(root, disk, "Debian 12 (bookworm), with nginx")
    _, errors = builder.let_go()

    assert builder.process.returncode == 3
    assert "mmdebstrap" in errors


def test_ctrl_c_is_answered_with_one_word_and_status_130(builder: Builder) -> None:
    assert builder.signal(signal.SIGINT) == ("", "interrupted\n")
    assert builder.process.returncode == 130


def test_being_terminated_is_an_orderly_end(builder: Builder) -> None:
    assert builder.signal(signal.SIGTERM) == ("", "")
    assert builder.process.returncode == 128 + signal.SIGTERM


# -- images that the project declares ------------------------------------------------------------------------------------------------


@pytest.fixture
def project(root: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two images, below whose folder the command is run; its builds take no time."""

    def build(store: ImageStore, recipe: str, *, name: str, **_: object) -> Image:
        disk.write_bytes(disk.read_bytes()[:-8] + os.urandom(8))
        return store.add(disk, name=name, description=recipe, replace=True)

    monkeypatch.setattr("pytest_vmbottle.images.declared.build", build)
    folder = root.parent / "project"
    (folder / "deep").mkdir(parents=True)
    (folder / "vmbottle.toml").write_text('[images.web]\nbuild = "debian-12"\nrun = "id"\n[images.mine]\npath = "../disk.raw"\n')
    monkeypatch.chdir(folder / "deep")
    return folder


def test_a_declared_image_is_built_by_its_name_and_built_again_when_asked_to(project: Path, root: Path) -> None:
    first, second = done("image", "build", "web"), done("image", "build", "web")
    (stored,) = ImageStore(root / "images").list()

    assert re.fullmatch(r"web [0-9a-f]{64}\n", first)
    assert first != second == f"web {stored.sha256}\n"
    assert re.fullmatch(r"web-[0-9a-f]{12}", stored.name)
    assert project.exists()


def test_declared_images_are_listed_after_those_of_the_catalog_with_where_they_come_from(project: Path, disk: Path) -> None:
    lines = done("image", "ls").splitlines()
    assert [line.split()[:2] for line in lines] == [["NAME", "SHA256"], ["web", "declared"], ["mine", "declared"]]
    assert f"({project / 'vmbottle.toml'}: images.web)" in lines[1]
    assert f"{project}/../disk.raw" in lines[2]
    done("image", "build", "web")
    done("image", "add", disk, "--name", "other")
    records = json.loads(done("image", "ls", "--json"))

    assert [record["name"] for record in records][-2:] == ["web", "mine"]
    assert records[-2] | {"source": "", "damaged": ""} == {
        "name": "web",
        "declared": f"{project / 'vmbottle.toml'}: images.web",
        "kind": "build",
        "source": "",
        "stored": records[1]["name"],
        "damaged": "",
    }


def test_a_wrong_declaration_is_told_and_ends_with_status_2(project: Path) -> None:
    (project / "vmbottle.toml").write_text('[images.web]\nbiuld = "debian-12"\n')

    for words in (("image", "build", "web"), ("image", "build", "debian-12"), ("image", "ls")):
        told = failed(2, *words)
        assert f"{project / 'vmbottle.toml'}: images.web.biuld" in told


@pytest.mark.usefixtures("project")
def test_the_name_and_packages_of_a_declared_image_stand_where_it_is_declared() -> None:
    assert "vmbottle.toml" in failed(2, "image", "build", "web", "--include", "nginx")
    assert "vmbottle.toml" in failed(2, "image", "build", "web", "--name", "other")


@pytest.mark.usefixtures("project")
def test_a_disk_that_is_used_where_it_lies_has_nothing_to_be_built_and_is_checked(disk: Path) -> None:
    assert done("image", "build", "mine") == f"mine {hashlib.sha256(disk.read_bytes()).hexdigest()}\n"
    disk.unlink()
    assert "'mine'" in failed(1, "image", "build", "mine")


# -- packs -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("root")
def test_a_catalog_without_packs_says_where_they_come_from() -> None:
    result = run("pack", "ls")

    assert result.stdout == ""
    assert "pytest" in result.stderr
    assert json.loads(done("pack", "ls", "--json")) == []


def test_packs_are_listed_oldest_first_with_what_they_take_in_blocks(stock: Stock) -> None:
    ram = stock.base.path / "ram.img"
    os.truncate(ram, 1 << 40)
    stock.age(stock.web, days=3)
    records = json.loads(done("pack", "ls", "--json"))

    assert [record["name"] for record in records] == ["web", stock.base.manifest.name, "db"]
    assert {record["key"]: record["size"] for record in records}[stock.base.key] == size_on_disk(stock.base.path) < 1 << 20
    assert {record["parent"] for record in records if record["name"] in ("web", "db")} == {stock.base.key}
    assert not any(record["in_use"] for record in records)
    header, first, *_ = done("pack", "ls").splitlines()
    assert header.split() == ["KEY", "KIND", "NAME", "AGE", "UNUSED", "SIZE", "MEMORY", "IN", "USE", "BACKEND"]
    assert re.match(rf"{stock.web.key[:12]}  template  web +3 d ", first)


def test_packs_of_one_name_are_told_apart_by_the_facts_that_differ(stock: Stock) -> None:
    rewrite(stock.db, name="web", disk_size=8 << 30, image="f" * 64)
    listed = done("pack", "ls")

    assert re.search(rf"^{stock.db.key[:12]} +template +web \(disk 8.0 GiB, image ffffff\) ", listed, re.MULTILINE)
    assert re.search(rf"^{stock.web.key[:12]} +template +web \(disk 1.0 MiB, image {stock.web.manifest.image[:6]}\) ", listed, re.MULTILINE)
    assert "(" not in next(line for line in listed.splitlines() if line.startswith(stock.base.key[:12]))


def test_packs_of_one_name_are_told_apart_by_the_machines_that_they_were_made_of(root: Path, disk: Path) -> None:
    user = Provisioner(Catalog(root), FakeBackend(), name="fake", settings=Settings())
    for cpus in (1, 2):
        user.pack(MachineSpec.resolve(disk, {"cpus": cpus}))
    user.close()

    assert sorted(re.findall(r"\((cpus=\d)\)", done("pack", "ls"))) == ["cpus=1", "cpus=2"]
    assert {record["spec"]["cpus"] for record in json.loads(done("pack", "ls", "--json"))} == {1, 2}


@pytest.mark.usefixtures("used")
def test_a_pack_that_a_run_holds_is_in_use() -> None:
    assert [record["in_use"] for record in json.loads(done("pack", "ls", "--json"))] == [True, True, True]


def test_names_cannot_move_the_cursor_or_forge_lines(stock: Stock) -> None:
    rewrite(stock.db, name="evil\x1b[2J\n::error::x")

    for shown in (done("pack", "ls"), done("pack", "show", stock.db.key)):
        assert "evil\\x1b[2J" in shown
        assert "\x1b" not in shown
        assert not re.search(r"^::error", shown, re.MULTILINE)


def test_a_pack_is_shown_with_the_packs_beneath_it_and_its_files(stock: Stock) -> None:
    record = json.loads(done("pack", "show", stock.web.key[:10], "--json"))

    assert record["key"] == stock.web.key
    assert [parent["key"] for parent in record["parents"]] == [stock.base.key]
    assert {name: file["digest"] for name, file in record["files"].items()} == stock.web.manifest.files
    shown = done("pack", "show", stock.web.key[:10])
    assert re.search(rf"^on +{stock.base.key[:12]} ", shown, re.MULTILINE)
    assert re.search(r"^file +ram.img \(32 B, [0-9a-f]{64}\)$", shown, re.MULTILINE)


def test_a_key_that_is_none_or_the_beginning_of_several_is_refused(stock: Stock) -> None:
    assert "'xyz'" in failed(1, "pack", "show", "xyz")
    assert "'../locks'" in failed(1, "pack", "rm", "../locks")
    twin = stock.catalog.packs / f"{stock.web.key[:-1]}{'0' if stock.web.key[-1] != '0' else '1'}"
    shutil.copytree(stock.web.path, twin)
    assert stock.web.key[:12] in failed(1, "pack", "show", stock.web.key[:10])
    assert json.loads(done("pack", "show", stock.web.key, "--json"))["name"] == "web"


def test_whole_packs_are_verified(stock: Stock) -> None:
    assert set(done("pack", "verify").splitlines()) == {f"ok  {key}" for key in stock.there()}
    assert done("pack", "verify", stock.web.key[:12]) == f"ok  {stock.web.key}\n"


def test_one_flipped_bit_is_found_told_and_left_where_it_is(stock: Stock) -> None:
    with (stock.web.path / "ram.img").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    result = run("pack", "verify")

    assert result.exit_code == 1
    assert f"bad {stock.web.key}" in result.stdout.splitlines()
    assert result.stdout.count("ok  ") == 2
    assert "ram.img" in result.stderr
    assert stock.web.path.is_dir()


def test_a_pack_whose_base_is_gone_is_bad(stock: Stock) -> None:
    stock.catalog.discard(stock.base.path)
    result = run("pack", "verify")

    assert result.exit_code == 1
    assert sorted(result.stdout.split()) == sorted(["bad", stock.web.key, "bad", stock.db.key])
    assert stock.web.key[:12] in result.stderr
    shown = done("pack", "show", stock.web.key)
    assert re.search(rf"^on +{stock.base.key[:12]} ", shown, re.MULTILINE)


def test_a_pack_whose_base_was_made_again_is_bad(stock: Stock, disk: Path) -> None:
    stock.catalog.discard(stock.base.path)
    again = Provisioner(stock.catalog, FakeBackend(), name="fake", settings=Settings())
    assert again.pack(MachineSpec.resolve(disk, {})).key == stock.base.key
    again.close()

    assert sorted(run("pack", "verify").stdout.split()) == sorted(["ok", stock.base.key, "bad", stock.web.key, "bad", stock.db.key])


def test_a_pack_without_a_manifest_is_told_verified_as_bad_and_can_be_removed(stock: Stock) -> None:
    (stock.db.path / "pack.json").unlink()

    assert f"`vmbottle pack rm {stock.db.key[:12]}`" in run("pack", "ls").stderr
    assert f"bad {stock.db.key}" in run("pack", "verify").stdout
    assert "pack.json" in failed(1, "pack", "show", stock.db.key)
    assert done("pack", "rm", stock.db.key[:12]) == f"{stock.db.key}\n"
    assert stock.there() == {stock.base.key, stock.web.key}


@pytest.mark.parametrize("words", [("image", "ls"), ("image", "verify"), ("pack", "ls"), ("pack", "prune"), ("machine", "ls"), ("gc",)])
def test_who_only_looks_makes_no_catalog(tmp_path: Path, words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "none"), *words])

    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())


def test_a_machine_of_qemu_that_is_to_be_packed_is_refused_before_it_is_stopped(tmp_path: Path) -> None:
    place = Kept(tmp_path / "catalog" / "machines" / "dev")
    place.folder.mkdir(parents=True)
    hold = try_lock(place.folder, deadline=Deadline(10))
    assert hold is not None
    place.note(Record(name="dev", source="debian-12", state="running", backend="qemu"))
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "catalog"), "pack", "build", "--from-machine", "dev", "--yes"])
    os.close(hold)

    assert result.exit_code == 1
    assert "qemu" in result.output


def test_a_pack_is_removed_wholly(stock: Stock) -> None:
    assert done("pack", "rm", stock.web.key[:12], stock.web.key) == f"{stock.web.key}\n"
    assert stock.there() == {stock.base.key, stock.db.key}
    assert {path.name for path in stock.catalog.packs.iterdir()} == stock.there(), "nothing of it is left under another name"


def test_a_pack_that_others_stand_on_goes_only_with_them(stock: Stock) -> None:
    told = failed(1, "pack", "rm", stock.base.key, stock.db.key)
    assert stock.web.key[:12] in told
    assert stock.there() == {stock.base.key, stock.web.key, stock.db.key}

    (command,) = re.findall(r"`vmbottle (pack rm [^`]*)`", told)
    *_, last = done(*command.split()).splitlines()
    assert last == stock.base.key
    assert stock.there() == set()


@pytest.mark.parametrize("held", ["web", "db"])
def test_a_pack_in_use_is_not_removed_nor_are_the_others_of_the_call(stock: Stock, held: str) -> None:
    pack = getattr(stock, held)
    hold = stock.catalog.lease(pack.path)
    told = failed(1, "pack", "rm", stock.db.key, stock.web.key)
    os.close(hold)

    assert pack.key[:12] in told
    assert stock.there() == {stock.base.key, stock.web.key, stock.db.key}


def test_pruning_without_options_removes_all_that_nobody_uses(stock: Stock) -> None:
    result = run("pack", "prune")

    assert result.stdout.splitlines()[-1] == stock.base.key
    assert set(result.stdout.split()) == {stock.base.key, stock.web.key, stock.db.key}
    assert "3 of 3" in result.stderr
    assert stock.there() == set()


def test_pruning_leaves_what_is_used_and_what_that_stands_on(stock: Stock) -> None:
    hold = stock.catalog.lease(stock.web.path)
    assert done("pack", "prune", "--dry-run") == done("pack", "prune") == f"{stock.db.key}\n"
    os.close(hold)

    assert stock.there() == {stock.base.key, stock.web.key}


def test_a_dry_run_removes_nothing_and_says_what_would_go(stock: Stock) -> None:
    result = run("pack", "prune", "--dry-run")

    assert set(result.stdout.split()) == stock.there() == {stock.base.key, stock.web.key, stock.db.key}
    assert "3 of 3" in result.stderr


def test_pruning_by_age_removes_the_old_ones_but_no_base_of_a_young_one(stock: Stock) -> None:
    stock.age(stock.base, days=30)
    stock.age(stock.web, days=8)

    assert done("pack", "prune", "--older-than", "7d") == f"{stock.web.key}\n"
    assert done("pack", "prune", "--older-than", "1w") == ""
    assert stock.there() == {stock.base.key, stock.db.key}


def unused(pack: packs.Pack, *, days: float) -> None:
    """Has it last been used so long ago."""
    os.utime(pack.path, (time.time() - days * 86400,) * 2)


def test_pruning_by_use_removes_what_no_run_has_taken_up_for_long(stock: Stock) -> None:
    for pack in (stock.base, stock.web, stock.db):
        unused(pack, days=40)
    for pack in (stock.base, stock.db):
        pack.note_use()
    listed = {record["key"]: record["unused_for"] for record in json.loads(done("pack", "ls", "--json"))}

    assert listed[stock.web.key] > 39 * 86400 > listed[stock.db.key]
    assert done("pack", "prune", "--unused-for", "41d") == ""
    assert done("pack", "prune", "--unused-for", "30d", "--dry-run") == f"{stock.web.key}\n"
    assert done("pack", "prune", "--unused-for", "30d") == f"{stock.web.key}\n"
    assert stock.there() == {stock.base.key, stock.db.key}


def test_pruning_by_size_removes_what_was_not_used_for_longest_until_the_rest_fits(stock: Stock) -> None:
    unused(stock.base, days=30)
    unused(stock.db, days=20)
    unused(stock.web, days=10)
    total = sum(size_on_disk(path) for path in stock.catalog.packs.iterdir())

    assert done("pack", "prune", "--keep-size", str(total)) == ""
    assert done("pack", "prune", "--keep-size", str(total - 1)) == f"{stock.db.key}\n"
    assert done("pack", "prune", "--keep-size", "1") == f"{stock.web.key}\n{stock.base.key}\n"


def test_pruning_removes_what_cannot_be_read(stock: Stock) -> None:
    (stock.db.path / "pack.json").unlink()

    assert done("pack", "prune", "--older-than", "1h") == f"{stock.db.key}\n"


def test_packs_that_were_put_aside_are_mentioned_with_the_command_that_removes_them(stock: Stock) -> None:
    stock.catalog.quarantine(stock.db.path)

    assert "vmbottle pack prune" in run("pack", "ls").stderr
    run("pack", "prune", "--dry-run")
    assert stock.catalog.quarantined()
    run("pack", "prune")
    assert not stock.catalog.quarantined()


def test_an_image_that_a_run_uses_is_not_removed(root: Path, disk: Path) -> None:
    done("--catalog", root, "image", "add", disk, "--name", "mine")
    user = Provisioner(Catalog(root), FakeBackend(), name="fake", settings=Settings())
    user.pack(MachineSpec.resolve("mine", {}))

    assert "mine" in failed(1, "--catalog", root, "image", "rm", "mine")
    user.close()
    done("--catalog", root, "image", "rm", "mine")
    assert list((root / "images" / "sha256").iterdir()) == []
