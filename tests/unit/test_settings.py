"""One table of settings, which hold wherever machines are started: in pytest, and in the keeper of a machine without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from pytest_vmbottle.backends.make import make
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main
from pytest_vmbottle.errors import SpecError
from pytest_vmbottle.host.account import Account
from pytest_vmbottle.settings import SETTINGS, Settings
from pytest_vmbottle.spec.host_address import HostAddress
from pytest_vmbottle.spec.pack_kind import PackKind
from pytest_vmbottle.standalone import daemon as keeper
from pytest_vmbottle.standalone.client import Kept, Record

GIVEN = {
    "backend": ("smolvm", "backend", "smolvm"),
    "accel": ("tcg", "accelerator", "tcg"),
    "catalog": ("/x", "catalog", "/x"),
    "missing": ("fail", "skips_missing", False),
    "pack": ("disk", "pack_kind", PackKind.DISK),
    "rebuild": ("yes", "rebuild", True),
    "timeout-factor": ("2.5", "timeout_factor", 2.5),
    "memory-budget": ("2G", "memory_budget", 2 << 30),
    "infra-retries": ("4", "infra_retries", 4),
    "spares": ("3", "spares", 3),
    "capsule": ("failed", "capsule", "failed"),
    "registry": ("host.example/packs", "registry", "host.example/packs"),
    "registry-push": ("1", "registry_push", True),
    "artifacts": ("always", "artifacts", "always"),
    "output": ("/x", "output", "/x"),
    "keep": ("failed", "keep", "failed"),
    "keep-for": ("90m", "keep_seconds", 5400.0),
    "fail-on-leak": ("1", "fail_on_leak", True),
    "baselines": ("/x", "baselines", "/x"),
    "new-baselines": ("yes", "new_baselines", True),
    "shard": ("2/4", "shard", (2, 4)),
    "hosts": ("ssh://ann@lab:22", "hosts", (HostAddress(host="lab", user="ann", port=22),)),
    "durations": ("/x", "durations", "/x"),
    "smolvm-images": ("debian-12 =, web = ./web.tar\n", "images", {"debian-12": "", "web": "./web.tar"}),
}


def read(*sources: Mapping[str, str]) -> Settings:
    return Settings.read(*(lambda setting, source=source: source.get(setting.name) for source in sources))


@pytest.mark.parametrize("name", GIVEN)
def test_the_first_source_that_says_something_counts(name: str) -> None:
    text, field, value = GIVEN[name]

    last = {"registry": "host.example/packs", name: "nonsense"}
    assert getattr(read({}, {name: ""}, {name: text}, last), field) == value


def test_every_setting_has_a_default_that_makes_sense() -> None:
    assert read().timeout_factor == 1
    assert {setting.name for setting in SETTINGS} == {*GIVEN, "run-as"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accel", "xen"),
        ("pack", "ram"),
        ("timeout-factor", "-1"),
        ("memory-budget", "lots"),
        ("infra-retries", "9" * 5000),
        ("run-as", "root"),
        ("registry", "packs"),
        ("shard", "5/4"),
        ("shard", "0/4"),
        ("shard", "2"),
        ("hosts", "lab"),
        ("hosts", "ssh://-oProxyCommand=x"),
        ("hosts", "ssh://-x@lab"),
        ("hosts", "ssh://ann:secret@lab"),
        ("hosts", "ssh://lab?shell=x"),
        ("hosts", "ssh://lab,ssh://lab"),
        ("registry-push", "yes"),
        ("registry", "host.example/packs:tag"),
        ("smolvm-images", "debian-12"),
        ("smolvm-images", "= ./web.tar"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_value_is_told_with_its_option(name: str, value: str) -> None:
    with pytest.raises(SpecError) as caught:
        read({name: value})

    assert str(caught.value).startswith(f"--{name}")


def test_backends_are_made_as_they_were_ordered(tmp_path: Path) -> None:
    account = Account(name="joe", uid=1000, gid=1000, groups=())
    told = attrs.evolve(read({"accel": "tcg", "pack": "disk"}), account=account)
    made = make("qemu", told, folder=tmp_path)

    assert made is not None
    assert vars(made).items() >= {"_account": account, "_pack_kind": PackKind.DISK}.items()
    assert make("xen", told, folder=tmp_path) is None


def _ordered(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Has machines only be ordered, by commands that are told nothing by the environment."""
    ordered: list[Mapping[str, Any]] = []

    def start(self: Kept, order: Mapping[str, Any], _: object, *, snapshot: object) -> Record:
        assert snapshot is None
        ordered.append(order)
        return Record(name=self.name, source="debian-12")

    monkeypatch.setattr(Kept, "start", start)
    for setting in SETTINGS:
        monkeypatch.delenv(setting.env, raising=False)
    return ordered


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_machine_without_pytest_is_ordered_with_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    said = {"backend": "qemu", "accel": "tcg", "pack": "disk", "memory-budget": "3G", "infra-retries": "0", "timeout-factor": "2"}
    ordered = _ordered(monkeypatch)
    if way == "environment":
        for name, value in {**said, "rebuild": "true"}.items():
            monkeypatch.setenv(f"VMBOTTLE_{name.replace('-', '_').upper()}", value)
    options = [f"--{name}={value}" for name, value in said.items()] + ["--rebuild"] if way == "option" else []
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path), "machine", "start", "debian-12", *options])

    assert result.exit_code == 0, result.output
    assert ordered[0]["settings"] == {**said, "rebuild": "true"}


def test_paths_that_names_stand_for_hold_in_the_folder_of_the_keeper_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordered = _ordered(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VMBOTTLE_SMOLVM_IMAGES", "debian-12 =, web = ./web.tar, app = library/app")
    Path("web.tar").touch()
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "catalog"), "machine", "start", "web", "--backend", "smolvm"])

    assert result.exit_code == 0, result.output
    assert ordered[0]["settings"]["smolvm-images"] == f"debian-12 = \nweb = {tmp_path / 'web.tar'}\napp = library/app"


def test_every_setting_of_the_command_line_is_in_its_help_with_its_environment_variable() -> None:
    start, doctor, all_commands = (
        " ".join(CliRunner().invoke(main, [*words, "--help"]).output.split()) for words in (["machine", "start"], ["doctor"], [])
    )

    for setting in SETTINGS:
        told = f"--{setting.name} {setting.takes} {setting.sentence}; also {setting.env}.".replace("  ", " ")
        assert (told in start) is not setting.tests_only
        assert (told in doctor) is (setting.name in ("backend", "accel", "pack", "run-as", "memory-budget"))
        assert (told in all_commands) is (setting.name == "catalog")


def test_a_wrong_setting_is_a_wrong_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMBOTTLE_MEMORY_BUDGET", "lots")
    result = CliRunner().invoke(main, ["--catalog", str(tmp_path / "new"), "machine", "start", "debian-12"])

    assert result.exit_code == 2
    assert "--memory-budget" in result.output


def test_a_keeper_does_as_it_was_ordered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def provisioner(_: object, backend: object, *, name: str, settings: object) -> object:
        seen.extend((backend, name, settings))
        raise SpecError("seen enough")

    monkeypatch.setattr(keeper, "Provisioner", provisioner)
    monkeypatch.setattr(Account, "parse", lambda text: SimpleNamespace(name=text))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    order = {
        "catalog": str(tmp_path / "catalog"),
        "folder": str(tmp_path),
        "settings": {
            "run-as": "joe",
            "pack": "disk",
            "memory-budget": "3G",
            "infra-retries": "5",
            "rebuild": "true",
            "timeout-factor": "2",
        },
        "keywords": {"source": "debian-12", "name": "web"},
    }
    (tmp_path / "catalog").mkdir(mode=0o700)
    with pytest.raises(SpecError), keeper._provided(Kept(tmp_path / "web"), order, print):
        pass

    backend, name, settings = seen
    assert (name, backend._account.name, backend._pack_kind) == ("qemu", "joe", PackKind.DISK)
    assert (settings.memory_budget, settings.retries, settings.timeout_factor) == (3 << 30, 5, 2)
    assert settings.rebuild_before is not None


def test_a_keeper_tells_smolvm_what_names_of_images_stand_for(tmp_path: Path) -> None:
    told = read({"smolvm-images": "debian-12 ="})

    assert vars(keeper._backend("smolvm", told, Catalog(tmp_path / "catalog"), print))["_images"] == {"debian-12": ""}
