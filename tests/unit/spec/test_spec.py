"""What the vm mark's keywords come to: checked values, layers, and keys that depend on what matters and on nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import types
from collections.abc import Callable
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_vmbottle import Layer, Machine, MachineSpec, SpecError, layer
from pytest_vmbottle.host.arch import host_arch
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.host.sizes import format_size, parse_size
from pytest_vmbottle.spec import BOOT, SIGNATURE, MachineKeywords, check_keywords

WORDS = st.text("abcdefgh", min_size=1, max_size=6)


@layer("debian-12", cpus=2, memory="2G", env={"A": "layer"}, packages=["nginx"])
def web(vm: Machine) -> None:
    vm.exec("true")


@layer(web, cpus=3)
def shop(vm: Machine) -> None:
    vm.exec("true")


def load(path: Path, text: str, **keywords: str) -> Layer:
    """The layer `made` of a module with this text."""
    path.write_text(f"from pytest_vmbottle import layer\n{text}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    vars(module).update(keywords)
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    made = module.made
    assert isinstance(made, Layer)
    return made


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("2G", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("64k", 64 << 10),
        (" 1 T ", 1 << 40),
        ("100", 100),
        (4096, 4096),
        ("8MB", 8 << 20),
    ],
)
def test_a_size_is_a_number_of_bytes_or_has_a_unit_of_1024(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1X", "-1G", "0", 0, -5, True, None, 1.5, "1,5G", "1e9", "٣G", "1G1M", "inf", "nan"])
def test_what_is_no_size_is_refused_with_an_example(text: Any) -> None:
    with pytest.raises(SpecError, match=re.escape(repr(text))):
        parse_size(text)


@given(st.integers(1, 1 << 44))
def test_a_size_that_was_written_for_people_is_read_back_within_a_tenth(size: int) -> None:
    assert parse_size(format_size(size).replace(" ", "")) == pytest.approx(size, rel=0.1, abs=1)


@pytest.mark.parametrize(
    "keywords",
    [
        {"name": ""},
        {"name": "1st"},
        {"name": "a b"},
        {"name": "ä"},
        {"name": "x" * 80},
        {"name": 5},
        {"name": "a\n"},
        {"backend": None},
        {"backend": "../x"},
        {"arch": 64},
        {"arch": "riscv64"},
        {"cpus": 0},
        {"cpus": 65},
        {"cpus": "2"},
        {"cpus": True},
        {"cpus": 1.0},
        {"memory": "lots"},
        {"memory": 0},
        {"memory": None},
        {"memory": 512},
        {"memory": "8M"},
        {"disk": "-1G"},
        {"disk": True},
        {"network": "my lan"},
        {"network": ""},
        {"network": 1},
        {"network": None},
        {"ports": 80},
        {"ports": "80"},
        {"ports": [0]},
        {"ports": [65536]},
        {"ports": ["80"]},
        {"ports": [True]},
        {"packages": "nginx"},
        {"packages": [""]},
        {"packages": [1]},
        {"packages": ["a\0b"]},
        {"packages": [Path("app.tar")]},
        {"packages": Path("app.deb")},
        {"files": ["/etc/x"]},
        {"files": {"etc/x": ""}},
        {"files": {"/etc/../x": ""}},
        {"files": {"/etc/x": 5}},
        {"files": {"/etc/x": ("", 0o17777)}},
        {"files": {"/etc/x": ("", "755")}},
        {"files": {"/etc/x": ("",)}},
        {"files": {"/etc/\0": ""}},
        {"run": "true"},
        {"run": [None]},
        {"user_data": "packages: []"},
        {"user_data": 5},
        {"user_data": b"#cloud-config"},
        {"user_data": ["#cloud-config"]},
        {"user_data": date(2026, 1, 1)},
        {"user_data": {"a": date(2026, 1, 1)}},
        {"user_data": {"a": [{"b": {1, 2}}]}},
        {"user_data": {"a": b"bytes"}},
        {"user_data": {"a": Path("/x")}},
        {"user_data": {"a": float("nan")}},
        {"user_data": {1: "a"}},
        {"user_data": {"a": {None: "b"}}},
        {"user_data": {"a": "\udc80"}},
        {"user_data": "#cloud-config\na: \udc80"},
        {"user_data": {"power_state": {"mode": "reboot"}}},
        {"user_data": {"package_reboot_if_required": True}},
        {"user_data": {"runcmd": ["reboot"]}},
        {"user_data": {"runcmd": [["sh", "-c", "reboot"]]}},
        {"user_data": {"runcmd": ["sudo systemctl --no-block poweroff"]}},
        {"user_data": {"bootcmd": [["shutdown", "-h", "now"]]}},
        {"kernel": ""},
        {"kernel": 5},
        {"initrd": "a\0"},
        {"cmdline": " "},
        {"cmdline": "root=/dev/vda\nquiet"},
        {"append": ["quiet"]},
        {"append": "x" * 1801},
        {"env": {"1A": "x"}},
        {"env": {"A": 1}},
        {"env": {"A": "\0"}},
        {"env": "A=1"},
        {"env": {"A\n": "x"}},
        {"user": "Root"},
        {"user": ""},
        {"user": "root\n"},
        {"display": "vga"},
        {"capture": "eth0"},
        {"disk": {"data": "1G"}},
        {"disks": "1G"},
        {"disks": ["data"]},
        {"disks": ("data",)},
        {"disks": {"data": "1X"}},
        {"disks": {"data": 5}},
        {"disks": {"data": None}},
        {"disks": {"root": "1G"}},
        {"disks": {"no such": "1G"}},
        {"disks": {"x" * 21: "1G"}},
        {"disks": {f"d{number}": "1G" for number in range(7)}},
        {"track_writes": "yes"},
        {"shares": "/srv"},
        {"shares": {"srv": "/tmp"}},
        {"shares": {"/": "/tmp"}},
        {"shares": {"/srv/../etc": "/tmp"}},
        {"shares": {"/a b": "/tmp"}},
        {"shares": {"/srv": 5}},
        {"shares": {"/srv": "/a,b"}},
        {"shares": {f"/s{number}": "/tmp" for number in range(7)}},
        {"cpu_clock": "fast"},
        {"cpu_clock": None},
        {"cpu": ""},
        {"cpu": 5},
        {"cpu": "EPYC svm"},
        {"cpu": "EPYC,"},
        {"cpu": "EPYC,,+svm"},
        {"cpu": "EPYC,svm"},
        {"cpu": "EPYC,+svm\n"},
        {"cpu": "EPYC,model-id=x"},
        {"cpu": "EPYC,hv-vendor-id=on,file=/etc/passwd"},
        {"cpu": "-EPYC"},
        {"nested": "yes"},
        {"nested": 1},
        {"fresh": "never"},
        {"fresh": None},
        {"panic": "expect"},
        {"panic": True},
        {"timeout": 0},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"timeout": "60"},
        {"timeout": True},
    ],
    ids=repr,
)
def test_a_value_that_makes_no_sense_is_refused_with_its_keyword_and_the_signature(keywords: dict[str, Any]) -> None:
    (keyword,) = keywords
    with pytest.raises(SpecError) as caught:
        check_keywords(keywords)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{keyword}=")
    assert SIGNATURE in "\n".join(rest)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("cpuss", "cpus"), ("mem", None), ("memroy", "memory"), ("userdata", "user_data"), ("zzz", None)]
)
def test_an_unknown_keyword_is_answered_with_the_one_that_was_meant(wrong: str, meant: str | None) -> None:
    with pytest.raises(SpecError, match=f"'{wrong}'") as caught:
        check_keywords({wrong: 1})
    assert (f"'{meant}'" in str(caught.value)) is (meant is not None)
    assert SIGNATURE in str(caught.value)


@pytest.mark.parametrize("source", ["", None, 5, ["debian-12"], b"debian-12"])
def test_a_source_that_is_neither_image_nor_path_nor_layer_is_refused(source: Any) -> None:
    with pytest.raises(SpecError, match="source="):
        MachineSpec(source=source)


def test_a_layer_refuses_a_wrong_keyword_where_it_is_defined() -> None:
    with pytest.raises(SpecError, match="'memory'"):
        layer("debian-12", memmory="1G")  # type: ignore[call-arg]


def test_a_machine_has_no_network_or_the_hosts_or_a_private_one() -> None:
    closed, opened, private = (MachineSpec(source="debian-12", network=network) for network in (False, True, "office"))
    assert [(spec.nat, spec.lans) for spec in (closed, opened, private)] == [(False, ()), (True, ()), (False, ("office",))]


@pytest.mark.parametrize("name", ["data_base", "db-", "localhost", "LocalHost"])
def test_a_machine_on_a_private_lan_is_called_what_a_host_can_be_called(name: str) -> None:
    assert MachineSpec(source="debian-12", name=name).name == name
    with pytest.raises(SpecError, match=f"name='{name}'"):
        MachineSpec(source="debian-12", name=name, network="lan")


def test_a_machine_has_the_hosts_architecture_or_one_of_two_others_by_either_of_their_names() -> None:
    assert MachineSpec(source="debian-12").arch == host_arch()
    assert MachineSpec(source="debian-12", arch="arm64") == MachineSpec(source="debian-12", arch="aarch64")
    with pytest.raises(SpecError, match="arch='s390x'"):
        MachineSpec(source="debian-12", arch="s390x")


def test_memory_is_whole_mebibytes_because_nothing_else_fits_the_machine() -> None:
    assert MachineSpec(source="debian-12", memory="1.3G").memory == 1332 << 20
    assert MachineSpec(source="debian-12", memory=(64 << 20) + 1).memory == 65 << 20


def test_a_layers_keywords_are_defaults_for_machines_poured_from_it_and_the_marks_win() -> None:
    plain = MachineSpec.resolve(shop, {}, defaults={"cpus": 9, "user": "joe", "memory": "8G"})
    marked = MachineSpec.resolve(shop, {"cpus": 4, "env": {"B": "mark"}})

    assert (plain.cpus, plain.memory, plain.user, plain.env) == (3, 2 << 30, "joe", (("A", "layer"),))
    assert (marked.cpus, marked.memory, marked.env) == (4, 2 << 30, (("B", "mark"),))


def test_a_guest_of_an_architecture_without_nesting_is_refused_with_the_one_that_has_it() -> None:
    assert MachineSpec(source="debian-12", arch="x86_64", nested=True).nested
    with pytest.raises(SpecError, match="nested=True"):
        MachineSpec(source="debian-12", arch="aarch64", nested=True)


def test_what_a_layer_prepares_is_done_by_its_step_and_not_again_for_the_machine() -> None:
    spec = MachineSpec.resolve(shop, {"run": ["true"]})

    assert spec.packages == ()
    assert [step.name for step in spec.steps] == ["web", "shop", "prepared"]
    assert spec.image == "debian-12"
    assert [step.name for step in MachineSpec.resolve(shop, {}).steps] == ["web", "shop"]


KEYWORDS = {
    "cpus": 2,
    "cpu": "EPYC-v1,+svm,-avx2,la57=off",
    "cpu_clock": "host",
    "nested": True,
    "memory": "2G",
    "display": True,
    "disks": {"data": "1G", "other": 1 << 20},
    "track_writes": True,
    "capture": True,
    "shares": {"/srv": "here"},
    "ports": [80, 443],
    "env": {"A": "1", "B": "2", "C": "3"},
    "files": {"/a": "1", "/b": b"2", "/c": "3"},
    "user_data": {"a": {"x": 1, "y": 2}, "b": 2},
    "cmdline": "root=/dev/vda1",
    "append": "quiet foo=1",
    "run": ["true"],
    "user": "joe",
}


@given(st.permutations(list(KEYWORDS)), st.permutations(["A", "B", "C"]), st.permutations(["/a", "/b", "/c"]), st.permutations(["a", "b"]))
def test_the_order_of_keywords_and_of_dictionaries_changes_no_key(
    keys: list[str], env: list[str], files: list[str], data: list[str]
) -> None:
    reordered: dict[str, Any] = {key: KEYWORDS[key] for key in keys}
    for key, order in (("env", env), ("files", files), ("user_data", data)):
        reordered[key] = {inner: reordered[key][inner] for inner in order}
    one, other = (MachineSpec.resolve("debian-12", keywords) for keywords in (KEYWORDS, reordered))

    assert one == other
    assert [step.recipe() for step in one.steps] == [step.recipe() for step in other.steps]
    assert one.boot_digest() == other.boot_digest()


@pytest.mark.parametrize(
    "keyword",
    [
        "cpus",
        "cpu",
        "nested",
        "memory",
        "disks",
        "track_writes",
        "display",
        "capture",
        "shares",
        "ports",
        "env",
        "files",
        "user_data",
        "cmdline",
        "append",
        "run",
        "user",
    ],
)
def test_every_keyword_makes_another_spec_and_only_what_the_guest_boots_with_in_the_boot_digest(keyword: str) -> None:
    bare = MachineSpec.resolve("debian-12", {})
    changed = MachineSpec.resolve("debian-12", {keyword: KEYWORDS[keyword]})

    assert changed != bare
    assert (changed.boot_digest() != bare.boot_digest()) is (keyword in BOOT)


def test_disks_of_a_mark_are_added_to_those_of_its_layers_and_change_none(tmp_path: Path) -> None:
    image = tmp_path / "image"

    @layer("debian-12", disks={"data": "1G", "given": image})
    def below(_: object) -> None: ...

    same = {"data": "1G", "given": str(image)}
    spec = MachineSpec.resolve(below, {"disks": {**same, "more": "2G"}})
    assert dict(spec.disks) == {"data": 1 << 30, "given": image, "more": 2 << 30}
    for other in ({"data": "2G"}, {"data": image}, {"given": tmp_path / "other"}, {"given": "1G"}):
        with pytest.raises(SpecError, match="a layer has made this disk from"):
            MachineSpec.resolve(below, {"disks": other})


def test_a_recipe_has_the_content_of_disk_images_and_not_their_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(b"content")

    def recipe(image: Path) -> str:
        return MachineSpec.resolve("debian-12", {"disks": {"data": image}, "run": ["true"]}).steps[-1].recipe()

    before = recipe(one)
    assert recipe(two) == before
    one.write_bytes(b"CONTENT")
    assert recipe(one) != before
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "regular file")):
        with pytest.raises(SpecError, match=reason):
            recipe(path)


def test_a_recipe_has_the_content_of_package_files(tmp_path: Path) -> None:
    package = tmp_path / "app.deb"
    package.write_bytes(b"content")

    def recipe(*packages: str | Path) -> str:
        return MachineSpec(source="debian-12", packages=packages).steps[-1].recipe()

    before = recipe(package, "nginx")
    assert recipe(package, "nginx") == before
    assert recipe("app.deb", "nginx") != before, "a string is always a name"
    package.write_bytes(b"CONTENT")
    assert recipe(package, "nginx") != before


def test_packs_of_a_kernel_of_ones_own_depend_on_its_content_and_not_on_its_place(tmp_path: Path) -> None:
    one, two = tmp_path / "bzImage", tmp_path / "other"
    for path in (one, two):
        path.write_bytes(b"content")
    bare = MachineSpec(source="debian-12").boot_digest()
    before = MachineSpec(source="debian-12", kernel=one).boot_digest()
    assert before != bare
    assert MachineSpec(source="debian-12", kernel=str(two)).boot_digest() == before
    assert MachineSpec(source="debian-12", initrd=one).boot_digest() not in (before, bare)
    one.write_bytes(b"CONTENT")
    assert MachineSpec(source="debian-12", kernel=one).boot_digest() != before
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "is not a kernel: it is not a regular file")):
        with pytest.raises(SpecError, match=reason):
            MachineSpec(source="debian-12", kernel=path).boot_digest()
    assert MachineSpec(source="debian-12", kernel="bzImage").plain_keywords()["kernel"] == str(Path("bzImage").absolute())


def test_a_guest_whose_clocks_follow_its_instructions_shares_no_pack_with_another() -> None:
    counting = MachineSpec.resolve("debian-12", {"cpu_clock": "instructions"})
    assert counting.boot_digest() != MachineSpec.resolve("debian-12", {}).boot_digest()


@pytest.mark.parametrize("more", [{"cpus": 2}, {"nested": True, "arch": "x86_64"}], ids=repr)
def test_only_the_instructions_of_one_processor_are_counted(more: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="cpu_clock"):
        MachineSpec.resolve("debian-12", {"cpu_clock": "instructions", **more})


def test_the_keywords_that_type_checkers_know_are_those_of_a_spec() -> None:
    assert MachineKeywords.__annotations__.keys() == {field.name for field in attrs.fields(MachineSpec)} - {"source"}


@given(st.dictionaries(WORDS, WORDS), st.randoms())
def test_a_digest_depends_on_what_a_mapping_holds_and_not_on_its_order(mapping: dict[str, str], random: Any) -> None:
    items = list(mapping.items())
    random.shuffle(items)

    assert digest(dict(items)) == digest(mapping)
    assert digest({**mapping, "another": "entry"}) != digest(mapping)


def test_parts_of_a_digest_do_not_run_together() -> None:
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest(["ab", "c"]), digest("abc", "")}) == 5


BODY = "@layer('debian-12'{more})\ndef made(vm):\n    vm.exec({command!r})\n"


def test_a_layer_is_another_when_its_functions_source_changes_and_the_same_in_another_file(tmp_path: Path) -> None:
    first = load(tmp_path / "one.py", BODY.format(more="", command="true"))
    same = load(tmp_path / "two.py", "\n\n" + BODY.format(more="", command="true"))
    changed = load(tmp_path / "three.py", BODY.format(more="", command="false"))

    assert first.recipe() == same.recipe()
    assert first.recipe() != changed.recipe()


def test_a_layer_is_another_when_its_version_changes(tmp_path: Path) -> None:
    recipes = {load(tmp_path / f"v{n}.py", BODY.format(more=f", version={n}", command="true")).recipe() for n in range(3)}

    assert len(recipes) == 3


def test_a_layer_is_another_when_a_file_it_depends_on_changes_and_paths_are_seen_from_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a").write_text("1")
    made = load(tmp_path / "one.py", BODY.format(more=", depends=['conf']", command="true"))
    before = made.recipe()
    assert made.recipe() == before

    (tmp_path / "conf" / "a").write_text("2")
    changed = made.recipe()
    (tmp_path / "conf" / "b").write_text("")
    added = made.recipe()
    (tmp_path / "conf" / "__pycache__").mkdir()
    (tmp_path / "conf" / "__pycache__" / "a.pyc").write_text("what Python made of it")
    assert made.recipe() == added
    (tmp_path / "conf" / "b").rename(tmp_path / "conf" / "c")

    assert len({before, changed, added, made.recipe()}) == 4


def tree(folder: Path) -> Path:
    """A folder with one of each kind."""
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("text")
    (folder / "file").write_text("text")
    (folder / "link").symlink_to("file")
    (folder / "up").symlink_to("..")
    (folder / "self").symlink_to("self")
    (folder / "dangling").symlink_to("nowhere")
    return folder


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file can be run": lambda folder: (folder / "file").chmod(0o755),
    "a file is closed to others": lambda folder: (folder / "sub" / "file").chmod(0o600),
    "a folder is closed to others": lambda folder: (folder / "sub").chmod(0o700),
    "a link leads elsewhere": lambda folder: relink(folder / "link", "sub/file"),
    "a dangling link leads elsewhere": lambda folder: relink(folder / "dangling", "gone"),
    "a link became the file": lambda folder: replace(folder / "link", "text"),
    "an empty folder came": lambda folder: (folder / "sub" / "empty").mkdir(),
    "a file was moved": lambda folder: (folder / "file").rename(folder / "sub" / "moved"),
}


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def replace(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_modes_and_links_belong_to_what_a_layer_depends_on(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = tree(tmp_path / "conf")
    made = Layer(source="debian-12", function=None, depends=(folder,))
    before = made.recipe()
    assert made.recipe() == before

    change(folder)
    assert made.recipe() != before


def test_what_is_no_file_is_skipped_and_told_and_never_read(tmp_path: Path) -> None:
    folder = tree(tmp_path / "conf")
    os.mkfifo(folder / "fifo")
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(folder / "socket"))
    skipped: list[Path] = []
    odd = [folder, Path("/dev/zero"), folder / "fifo", folder / "up", folder / "self", folder / "dangling"]
    made = Layer(source="debian-12", function=None, depends=tuple(odd), keywords={"files": {"/x": folder / "fifo"}})

    assert made.recipe(skipped=skipped.append) == made.recipe()
    assert set(skipped) == {folder / "fifo", folder / "socket", Path("/dev/zero")}


def test_a_link_that_is_listed_itself_counts_with_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("1")
    (tmp_path / "link").symlink_to("real")
    made = Layer(source="debian-12", function=None, depends=(tmp_path / "link",))
    before = made.recipe()
    (tmp_path / "real").write_text("2")
    assert made.recipe() != before


def test_a_tree_of_any_depth_is_read(tmp_path: Path) -> None:
    deep = tmp_path / "conf"
    deep.mkdir()
    for _ in range(1100):
        deep /= "d"
        deep.mkdir()
    (deep / "file").write_text("1")
    made = Layer(source="debian-12", function=None, depends=(tmp_path / "conf",))
    before = made.recipe()
    (deep / "file").write_text("2")
    assert made.recipe() != before
    while deep != tmp_path:  # rmtree() of some Pythons goes no deeper than they can call
        for path in deep.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        deep = deep.parent


def test_a_layer_is_another_when_a_local_file_that_it_writes_changes(tmp_path: Path) -> None:
    (tmp_path / "local").write_text("1")
    made = Layer(source="debian-12", function=None, keywords={"files": {"/etc/x": tmp_path / "local"}})
    before = made.recipe()
    (tmp_path / "local").write_text("2")

    assert made.recipe() != before
    private = Layer(source="debian-12", function=None, keywords={"files": {"/etc/x": (tmp_path / "local", 0o600)}})
    assert private.recipe() != made.recipe()


def test_a_file_that_a_layer_depends_on_and_that_is_not_there_is_told(tmp_path: Path) -> None:
    made = load(tmp_path / "one.py", BODY.format(more=", depends=['nowhere']", command="true"))

    with pytest.raises(SpecError, match="nowhere"):
        made.recipe()


def test_a_layer_without_a_source_text_is_told() -> None:
    space: dict[str, Any] = {}
    exec("def made(vm): pass", space)

    with pytest.raises(SpecError, match="made"):
        Layer(source="debian-12", function=space["made"], name="made").recipe()


def test_the_networks_that_may_be_reached_are_checked_and_written_alike() -> None:
    assert MachineSpec(source="x", network=["10.0.0.0/8", "2001:db8::/32"]).network == ("10.0.0.0/8", "2001:db8::/32")
    assert not MachineSpec(source="x", network=["10.0.0.0/8"]).nat
    assert MachineSpec(source="x", network=["10.0.0.0/8"]).networks == ("10.0.0.0/8",)
    for wrong in (["10.0.0.1/8"], ["here", "10.0.0.0/8"], [1], []):
        with pytest.raises(SpecError, match="network="):
            MachineSpec(source="x", network=wrong)


def test_shared_folders_are_whole_paths_and_share_the_ports_of_the_private_lans() -> None:
    spec = MachineSpec(source="x", shares={"/srv/b": "folder", "/srv/a": Path("/tmp")}, network=["one", "two", "three", "four"])
    assert spec.shares == (("/srv/a", Path("/tmp")), ("/srv/b", Path.cwd() / "folder"))
    assert spec.but(name="other").shares == spec.shares
    assert spec.plain_keywords()["shares"] == {"/srv/a": "/tmp", "/srv/b": str(Path.cwd() / "folder")}
    with pytest.raises(SpecError, match="at most 6 in all"):
        spec.but(shares={"/a": "/", "/b": "/", "/c": "/"})


def test_a_machine_is_on_as_many_private_lans_as_its_network_names() -> None:
    spec = MachineSpec(source="x", network=["front", "back"])
    assert (spec.lans, spec.networks, spec.nat) == (("front", "back"), (), False)
    assert MachineSpec(source="x", network=["lan"]) == MachineSpec(source="x", network="lan")
    for wrong, reason in ((["a", "a"], "twice"), (["a", "b", "c", "d", "e"], "at most 4")):
        with pytest.raises(SpecError, match=reason):
            MachineSpec(source="x", network=wrong)
    with pytest.raises(SpecError, match="'front'"):
        MachineSpec(source="x", name="data_base", network=["front", "back"])
