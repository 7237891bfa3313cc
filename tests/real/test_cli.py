"""The `vmbottle` command on this host as it is, with its QEMU and with packs of real machines."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pytest_vmbottle import Machine
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.cli import main


def run(catalog: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["--catalog", str(catalog), *words])


def findings(catalog: Path, *words: str) -> Mapping[str, Mapping[str, Any]]:
    result = run(catalog, "doctor", "--json", *words)
    assert result.exit_code == 0, result.output
    return {finding["topic"]: finding for finding in json.loads(result.stdout)}


def test_the_doctor_finds_that_this_host_runs_machines_and_how(tmp_path: Path) -> None:
    found = findings(tmp_path)

    assert found["qemu"]["state"] == found["qemu-img"]["state"] == found["catalog"]["state"] == "ok"
    assert found["qemu"]["details"]["version"].startswith("QEMU emulator version ")
    assert all(found["qemu"]["details"]["has"].values())
    accelerator = found["accelerator"]
    chosen, verdicts = accelerator["details"]["name"], accelerator["details"]["verdicts"]
    assert next(verdict["accelerator"]["name"] for verdict in verdicts if verdict["works"]) == chosen
    if chosen == "tcg":
        assert accelerator["state"] == "degraded"
        assert "using TCG" in accelerator["text"]
        assert accelerator["remedy"] or "KVM is present but runs no guest: using TCG" in accelerator["text"]
    else:
        assert accelerator["state"] == "ok"
    assert found["packs"]["details"]["kind"] == "template", found["packs"]["text"]
    assert "unknown" not in {finding["state"] for finding in found.values()}


def test_what_the_doctor_proved_no_machine_proves_again(tmp_path: Path) -> None:
    found = findings(tmp_path)["accelerator"]
    (record,) = (tmp_path / "proofs").glob("qemu-*.json")
    before = record.stat()
    proved = QemuBackend(proofs=tmp_path / "proofs").proof

    assert proved.accelerator.name == found["details"]["name"]
    assert record.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in (tmp_path / "proofs").iterdir()] == [record.name]


def test_the_doctor_tries_anew_each_time(tmp_path: Path) -> None:
    findings(tmp_path)
    (record,) = (tmp_path / "proofs").glob("qemu-*.json")
    record.write_text(record.read_text().replace('"template": null', '"template": "said once"'))
    found = findings(tmp_path)

    assert found["packs"]["details"]["kind"] == "template"
    assert "said once" not in record.read_text()


def test_emulation_as_asked_for_is_no_defect(tmp_path: Path) -> None:
    found = findings(tmp_path, "--accel", "tcg")["accelerator"]

    assert found["state"] == "ok"
    assert found["text"].startswith("using TCG as requested: a guest ran ")


def test_a_catalog_that_cannot_be_used_does_not_keep_the_rest_from_being_found_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(tmp_path / "file", "doctor", "--json", "--accel", "tcg")
    found = {finding["topic"]: finding for finding in json.loads(result.stdout)}

    assert result.exit_code == 3
    assert found["catalog"]["state"] == "missing"
    assert found["accelerator"]["state"] == "ok"
    assert found["packs"]["state"] == "ok"


@pytest.mark.vm("debian-12", memory="1G")
def test_the_pack_of_a_running_machine_is_listed_shown_kept_and_its_copy_verified_and_removed(
    session_vm: Machine, vm_catalog: Catalog, tmp_path: Path
) -> None:
    assert session_vm.exec("true").ok
    listed = json.loads(run(vm_catalog.root, "pack", "ls", "--json").stdout)
    record = next(record for record in listed if record["in_use"] and record["parent"] is None and record["kind"] == "template")
    assert 0 < record["size"] < record["memory"]  # in blocks: RAM is mostly holes
    refused = run(vm_catalog.root, "pack", "rm", record["key"])
    assert refused.exit_code == 1
    assert re.search(r"is in use|would lose the pack below", refused.stderr)
    assert Path(record["path"]).is_dir()

    copy = Catalog(tmp_path / "copy")
    copy.packs.mkdir(mode=0o700)
    subprocess.run(["cp", "--sparse=always", "-a", record["path"], copy.packs], check=True)
    shown = json.loads(run(copy.root, "pack", "show", record["key"][:10], "--json").stdout)
    assert {"ram.img", "state.bin", "disk.qcow2"} <= set(shown["files"])
    assert run(copy.root, "pack", "verify").stdout == f"ok  {record['key']}\n"

    with (copy.packs / record["key"] / "ram.img").open("r+b") as ram:
        ram.seek(1 << 20)
        byte = ram.read(1)[0]
        ram.seek(1 << 20)
        ram.write(bytes([byte ^ 1]))
    assert run(copy.root, "pack", "verify").exit_code == 1
    assert run(copy.root, "pack", "rm", record["key"][:10]).exit_code == 0
    assert list(copy.packs.iterdir()) == []
