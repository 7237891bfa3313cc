"""Images that a project declares: what is read, what is refused with which words, and what they are stored as."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle.errors import CatalogError, SpecError
from pytest_vmbottle.images import DeclaredImage, Image, ImageStore, Traits, declared_images, find_declared_images
from pytest_vmbottle.images import declared as declaring

MIB = 1 << 20
Declare = Callable[..., dict[str, DeclaredImage]]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def declare(folder: Path) -> Declare:
    """Writes a file of declarations and reads it."""

    def declare(text: str, file: str = "vmbottle.toml") -> dict[str, DeclaredImage]:
        (folder / file).write_text(text)
        return declared_images(folder)

    return declare


def disk(path: Path, fill: bytes = b"") -> Path:
    """The smallest file that passes for a disk."""
    content = bytearray(MIB)
    content[510:512] = b"\x55\xaa"
    content[4096 : 4096 + len(fill)] = fill
    path.write_bytes(content)
    return path


def judged(table: object) -> tuple[str, str]:
    """The kind of image that a table declares, or what is wrong with it."""
    try:
        return declaring._Table("web", "file: images.web", Path("/none"), table).image().kind, ""
    except SpecError as error:
        return "", str(error)


class TestReading:
    def test_a_folder_without_such_files_declares_nothing(self, folder: Path) -> None:
        assert declared_images(folder) == {}

    def test_a_build_has_packages_and_a_script(self, declare: Declare, folder: Path) -> None:
        (folder / "setup.sh").write_text("useradd web\n")
        found = declare('[images.web]\nbuild = "debian-12"\npackages = ["nginx", "curl"]\nscript = "setup.sh"\n')
        assert list(found) == ["web"]
        web = found["web"]
        assert (web.kind, web.source, web.packages, web.script) == ("build", "debian-12", ("nginx", "curl"), "useradd web\n")
        assert web.origin == f"{folder / 'vmbottle.toml'}: images.web"
        assert web.traits.prepared

    def test_a_script_may_stand_in_the_declaration(self, declare: Declare) -> None:
        assert declare('[images.web]\nbuild = "debian-13"\nrun = """\nuseradd web\n"""\n')["web"].script == "useradd web\n"

    def test_a_path_is_relative_to_the_file_that_declares_it(self, declare: Declare, folder: Path) -> None:
        found = declare(
            '[images.a]\npath = "build/disk.qcow2"\nuser = "admin"\nfirmware = "uefi"\nreadiness = "channel"\narch = "aarch64"\n'
            '[images.b]\npath = "/srv/disk.raw"\nkernel = "vmlinuz"\ninitrd = "initrd"\ncmdline = "root=/dev/vda"\n'
        )
        assert found["a"].source == str(folder / "build/disk.qcow2")
        assert found["a"].arch == "aarch64"
        assert found["a"].traits == Traits(firmware="uefi", user="admin", readiness="channel")
        assert found["b"].source == "/srv/disk.raw"
        assert (found["b"].kernel, found["b"].initrd) == (folder / "vmlinuz", folder / "initrd")
        assert found["b"].cmdline == "root=/dev/vda"

    def test_an_aarch64_disk_boots_by_uefi_unless_it_is_said(self, declare: Declare) -> None:
        assert declare('[images.a]\npath = "d"\narch = "aarch64"\n')["a"].traits.firmware == "uefi"
        assert declare('[images.a]\npath = "d"\narch = "x86_64"\n')["a"].traits.firmware == "bios"

    def test_a_url_has_a_digest(self, declare: Declare) -> None:
        found = declare(f'[images.a]\nurl = "https://example.org/a.qcow2"\nsha256 = "sha256:{"AB" * 32}"\n')["a"]
        assert (found.kind, found.source, found.sha256) == ("url", "https://example.org/a.qcow2", "ab" * 32)

    def test_in_pyproject_images_stand_below_our_own_table(self, declare: Declare, folder: Path) -> None:
        found = declare('[project]\nname = "x"\n[tool.vmbottle.images.web]\nbuild = "debian-12"\n', "pyproject.toml")
        assert found["web"].origin == f"{folder / 'pyproject.toml'}: tool.vmbottle.images.web"

    def test_both_files_of_a_folder_are_read(self, declare: Declare) -> None:
        declare('[tool.vmbottle.images.web]\nbuild = "debian-12"\n', "pyproject.toml")
        assert set(declare('[images.db]\nbuild = "debian-12"\n')) == {"web", "db"}

    def test_a_pyproject_that_does_not_speak_of_us_is_not_even_parsed(self, declare: Declare) -> None:
        assert declare("this is [ no TOML", "pyproject.toml") == {}
        assert declare('[project]\nname = "mine"\ndependencies = ["pytest-vmbottle"]\n', "pyproject.toml") == {}


# What is wrong in a vmbottle.toml, and the words that say so.
MISTAKES = {
    "no TOML": ("[images.web", "TOML"),
    "a key beside images": ("[image.web]\nbuild = 'debian-12'", r"vmbottle\.toml: image:"),
    "images is no table": ("images = 3", r"vmbottle\.toml: images:"),
    "an image is no table": ("[images]\nweb = 3", r"images\.web:"),
    "nothing said": ("[images.web]", r"images\.web:"),
    "a misspelt kind": ("[images.web]\nbiuld = 'debian-12'", r"'build'"),
    "two kinds": ("[images.web]\npath = 'a'\nurl = 'https://x/y'", "url"),
    "a misspelt key": ("[images.web]\nbuild = 'debian-12'\npakages = []", r"'packages'"),
    "a strange key": (
        "[images.web]\nbuild = 'debian-12'\nqqqq = 1",
        r"images\.web\.qqqq",
    ),
    "a key of another kind": ("[images.web]\npath = 'a'\npackages = []", r"images\.web\.packages"),
    "a digest of a build": (
        "[images.web]\nbuild = 'debian-12'\nsha256 = 'a'",
        r"images\.web\.sha256",
    ),
    "a number": ("[images.web]\npath = 3", r"images\.web\.path"),
    "an empty text": ("[images.web]\npath = ''", r"images\.web\.path"),
    "a NUL": ('[images.web]\npath = "a\\u0000b"', r"images\.web\.path"),
    "packages as text": ("[images.web]\nbuild = 'debian-12'\npackages = 'nginx'", r"images\.web\.packages"),
    "packages of numbers": ("[images.web]\nbuild = 'debian-12'\npackages = [1]", r"images\.web\.packages"),
    "no name of a package": (
        "[images.web]\nbuild = 'debian-12'\npackages = ['a;b']",
        "'a;b'",
    ),
    "an unknown recipe": (
        "[images.web]\nbuild = 'debian-21'",
        "'debian-1[0-9]'",
    ),
    "a foreign recipe": ("[images.web]\nbuild = 'plan-9'", "'plan-9'"),
    "two scripts": ("[images.web]\nbuild = 'debian-12'\nscript = 'vmbottle.toml'\nrun = 'id'", r"images\.web\.run"),
    "a missing script": (
        "[images.web]\nbuild = 'debian-12'\nscript = 'no.sh'",
        r"/no\.sh",
    ),
    "a script that is a folder": (
        "[images.web]\nbuild = 'debian-12'\nscript = '.'",
        "Is a directory",
    ),
    "no digest": ("[images.web]\nurl = 'https://example.org/x'", r"images\.web\.sha256"),
    "a short digest": ("[images.web]\nurl = 'https://example.org/x'\nsha256 = 'abc'", "'abc'"),
    "http": (f"[images.web]\nurl = 'http://example.org/x'\nsha256 = '{'0' * 64}'", r"images\.web\.url"),
    "a file URL": (f"[images.web]\nurl = 'file:///etc/shadow'\nsha256 = '{'0' * 64}'", r"images\.web\.url"),
    "an unknown architecture": ("[images.web]\npath = 'a'\narch = 'amd64'", "'amd64'"),
    "an unknown firmware": ("[images.web]\npath = 'a'\nfirmware = 'efi'", "'efi'"),
    "an unknown readiness": ("[images.web]\npath = 'a'\nreadiness = 'now'", r"images\.web\.readiness"),
    "no name of a user": ("[images.web]\npath = 'a'\nuser = 'a b'", "'a b'"),
    "a kernel alone": ("[images.web]\npath = 'a'\nkernel = 'k'", r"images\.web\.cmdline"),
    "an initrd alone": ("[images.web]\npath = 'a'\ninitrd = 'k'", r"images\.web\.kernel"),
    "no name of an image": ("[images.'../web']\nbuild = 'debian-12'", r"\.\./web"),
    "too long a name": (f"[images.{'x' * 88}]\nbuild = 'debian-12'", "x" * 88),
}


class TestMistakes:
    @pytest.mark.parametrize(("text", "told"), MISTAKES.values(), ids=MISTAKES)
    def test_a_mistake_is_told_with_the_file_and_the_key(self, declare: Declare, folder: Path, text: str, told: str) -> None:
        with pytest.raises(SpecError, match=told) as caught:
            declare(text)
        assert str(folder / "vmbottle.toml") in str(caught.value)

    def test_in_pyproject_the_key_is_told_from_the_files_top(self, declare: Declare) -> None:
        with pytest.raises(SpecError, match=r"tool\.vmbottle\.images\.web\.bild"):
            declare("[tool.vmbottle.images.web]\nbild = 'x'", "pyproject.toml")
        with pytest.raises(SpecError, match=r"\[tool\.vmbottle\.images\.NAME\]"):
            declare("[tool.vmbottle.image.web]\nbuild = 'x'", "pyproject.toml")
        with pytest.raises(SpecError, match=r"tool\.vmbottle"):
            declare("[tool]\nvmbottle = 3", "pyproject.toml")

    def test_a_name_in_both_files_is_a_mistake(self, declare: Declare) -> None:
        declare('[tool.vmbottle.images.web]\nbuild = "debian-12"\n', "pyproject.toml")
        with pytest.raises(SpecError, match=r"vmbottle\.toml: images\.web"):
            declare('[images.web]\nbuild = "debian-12"\n')

    def test_a_file_that_is_no_text_is_a_mistake(self, folder: Path) -> None:
        (folder / "vmbottle.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(SpecError, match="TOML"):
            declared_images(folder)
        (folder / "vmbottle.toml").write_text("a = " + "[" * 100_000)
        with pytest.raises(SpecError, match="TOML"):
            declared_images(folder)

    def test_a_folder_in_the_place_of_our_file_is_a_mistake_and_in_the_place_of_pyproject_nothing(self, folder: Path) -> None:
        (folder / "pyproject.toml").mkdir()
        assert declared_images(folder) == {}
        (folder / "vmbottle.toml").mkdir()
        with pytest.raises(SpecError, match="Is a directory"):
            declared_images(folder)

    def test_a_script_that_is_no_text_is_a_mistake(self, declare: Declare, folder: Path) -> None:
        (folder / "setup").write_bytes(b"\x7fELF\xff")
        with pytest.raises(SpecError, match="setup"):
            declare("[images.web]\nbuild = 'debian-12'\nscript = 'setup'")

    @given(
        table=st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["debian-12", "path", "https://x/y"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["path", "url", "build", "packages", "run", "sha256", "arch", "user", "x"]), inner)
            ),
            max_leaves=8,
        )
    )
    def test_whatever_is_declared_is_an_image_or_a_sentence(self, table: Any) -> None:
        kind, words = judged(table)
        assert kind in table if kind else words.startswith("file: images.web")


class TestFinding:
    def test_the_nearest_folder_that_declares_anything_is_the_project(self, tmp_path: Path) -> None:
        inner = tmp_path / "a" / "b" / "c"
        inner.mkdir(parents=True)
        (tmp_path / "vmbottle.toml").write_text('[images.far]\nbuild = "debian-12"\n')
        (tmp_path / "a" / "pyproject.toml").write_text('[tool.vmbottle.images.near]\nbuild = "debian-12"\n')
        (tmp_path / "a" / "b" / "pyproject.toml").write_text('[project]\nname = "vmbottle-user"\n')
        assert set(find_declared_images(inner)) == {"near"}
        assert set(find_declared_images(tmp_path)) == {"far"}

    def test_a_folder_that_everybody_may_write_to_ends_the_search(self, tmp_path: Path) -> None:
        inner = tmp_path / "shared" / "mine"
        inner.mkdir(parents=True)
        (tmp_path / "shared" / "vmbottle.toml").write_text('[images.planted]\nbuild = "debian-12"\n')
        (tmp_path / "shared").chmod(0o1777)
        assert find_declared_images(inner) == {}
        assert set(find_declared_images(tmp_path / "shared")) == {"planted"}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """List of the builds, which take no time."""
    calls: list[dict[str, Any]] = []

    def build(store: ImageStore, recipe: str, *, name: str, **options: Any) -> Image:
        calls.append({"recipe": recipe, **options})
        return store.add(disk(tmp_path / "built.raw", os.urandom(8)), name=name, replace=True)

    monkeypatch.setattr(declaring, "build", build)
    return calls


BUILD = '[images.web]\nbuild = "debian-12"\npackages = ["nginx"]\nrun = "id"\n'


class TestMaking:
    def test_a_build_is_made_once_and_found_by_its_own_name(self, declare: Declare, store: ImageStore, built: list[dict[str, Any]]) -> None:
        web = declare(BUILD)["web"]
        assert web.get(store) is None
        made = web.make(store)
        assert [(call["recipe"], call["include"], call["script"]) for call in built] == [("debian-12", ("nginx",), "id")]
        assert made.name == "web"
        assert web.get(store) == made
        assert store.names() == (web.stored_name,)

    @pytest.mark.parametrize(
        "changed", [BUILD.replace("nginx", "curl"), BUILD.replace("id", "id -u"), BUILD.replace("12", "13"), BUILD.replace("web", "db")]
    )
    @pytest.mark.usefixtures("built")
    def test_a_changed_declaration_is_another_image(self, declare: Declare, store: ImageStore, changed: str) -> None:
        made = declare(BUILD)["web"].make(store)
        (other,) = declare(changed).values()
        assert other.get(store) is None
        assert other.make(store).sha256 != made.sha256
        assert declare(BUILD)["web"].get(store) == made

    def test_a_changed_script_file_is_another_image(self, declare: Declare, folder: Path) -> None:
        names = []
        for content in ("id", "id -u", "id"):
            (folder / "setup.sh").write_text(content)
            names.append(declare('[images.web]\nbuild = "debian-12"\nscript = "setup.sh"\n')["web"].stored_name)
        assert names[0] == names[2] != names[1]

    def test_the_same_declaration_in_two_projects_is_one_image(self, declare: Declare, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "pyproject.toml").write_text(BUILD.replace("images.web", "tool.vmbottle.images.web"))
        assert declared_images(other)["web"].stored_name == declare(BUILD)["web"].stored_name
        assert declared_images(other) == declared_images(folder)

    def test_a_download_is_made_with_all_that_is_declared(
        self, declare: Declare, store: ImageStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def pull_url(store: ImageStore, url: str, *, name: str, options: Any, **rest: Any) -> Image:
            assert (url, rest["arch"], options.progress) == ("https://example.org/a.qcow2", "aarch64", print)
            return store.add(disk(tmp_path / "pulled.raw"), name=name, **rest)

        monkeypatch.setattr(declaring, "pull_url", pull_url)
        actual = hashlib.sha256(disk(tmp_path / "pulled.raw").read_bytes()).hexdigest()
        text = f'[images.far]\nurl = "https://example.org/a.qcow2"\nsha256 = "{actual}"\narch = "aarch64"\nuser = "admin"\n'
        far = declare(text)["far"]
        assert far.get(store) is None
        made = far.make(store, progress=print)
        assert made == far.get(store)
        assert (made.name, made.sha256, made.user, made.firmware, made.prepared) == ("far", actual, "admin", "uefi", False)
        assert store.names() == (far.stored_name,)
        moved = declare(text.replace("example.org", "mirror.example.org"))["far"]
        assert moved.get(store) == made, "what is downloaded is known by its digest, wherever it comes from"

    def test_a_disk_in_the_project_is_used_where_it_lies(self, declare: Declare, store: ImageStore, folder: Path) -> None:
        disk(folder / "disk.raw")
        image = declare('[images.mine]\npath = "disk.raw"\nuser = "admin"\nfirmware = "uefi"\n')["mine"].get(store)
        assert image is not None
        assert (image.name, image.disk, image.user, image.firmware) == ("mine", folder / "disk.raw", "admin", "uefi")
        assert store.names() == ()

    def test_a_disk_with_another_digest_than_declared_is_refused(self, declare: Declare, store: ImageStore, folder: Path) -> None:
        actual = hashlib.sha256(disk(folder / "disk.raw").read_bytes()).hexdigest()
        good = declare(f'[images.mine]\npath = "disk.raw"\nsha256 = "{actual}"\n')["mine"]
        bad = declare(f'[images.mine]\npath = "disk.raw"\nsha256 = "{"0" * 64}"\n')["mine"]
        assert good.make(store).sha256 == actual
        with pytest.raises(CatalogError, match=actual):
            bad.get(store)

    def test_a_disk_that_is_not_there_is_told_with_its_declaration(self, declare: Declare, store: ImageStore) -> None:
        with pytest.raises(CatalogError, match=r"images\.mine"):
            declare('[images.mine]\npath = "none.raw"\n')["mine"].get(store)

    def test_a_kernel_beside_a_disk_is_part_of_what_boots(self, declare: Declare, store: ImageStore, folder: Path) -> None:
        disk(folder / "disk.raw")
        keys = set()
        for kernel, cmdline in ((b"one", "a"), (b"two", "a"), (b"two", "b")):
            (folder / "kernel").write_bytes(kernel)
            image = declare(f'[images.mine]\npath = "disk.raw"\nkernel = "kernel"\ncmdline = "{cmdline}"\n')["mine"].make(store)
            assert (image.kernel, image.initrd, image.cmdline) == (folder / "kernel", None, cmdline)
            keys.add(image.key)
        assert len(keys) == 3
        (folder / "kernel").unlink()
        with pytest.raises(CatalogError, match="kernel: No such file"):
            declare('[images.mine]\npath = "disk.raw"\nkernel = "kernel"\ncmdline = "a"\n')["mine"].get(store)

    def test_what_is_unlike_is_stored_under_unlike_names(self, declare: Declare) -> None:
        web = declare(BUILD)["web"]
        traits = attrs.evolve(web.traits, readiness="channel")
        others = [attrs.evolve(web, **change) for change in ({"sha256": "a" * 64}, {"arch": "m68k"}, {"traits": traits}, {"packages": ()})]
        assert len({web.stored_name, *(other.stored_name for other in others)}) == 5
