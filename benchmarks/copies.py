"""How long copies take, next to `scp -r` and `rsync`: one large file, and many small ones, to a guest and from it.

All programs take turns in one run over the same machine, so that whatever else the computer does meanwhile falls on all of them alike: only
ratios within one run mean something. Each copies from the page cache of one side to a folder that is not there yet on the other.

    python benchmarks/copies.py --catalog ~/.cache/pytest-vmbottle
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs

from pytest_vmbottle import Machine, MachineSpec
from pytest_vmbottle.backends.qemu import QemuBackend
from pytest_vmbottle.catalog.catalog import Catalog
from pytest_vmbottle.catalog.location import default_root
from pytest_vmbottle.provision import Provisioner, Settings

AIMS = {"large": 3, "many": 10}
"""How many times as quick as scp a copy is to be."""
Copy = Callable[[Path, str, bool], None]
"""Copies between a host's path and a guest's; to the guest if the last says so."""


@attrs.frozen
class Programs:
    """The programs that are compared, over one machine."""

    machine: Machine
    config: Path

    def cp(self, here: Path, there: str, inward: bool) -> None:  # noqa: FBT001 - see Copy
        guest = self.machine.path(there)
        if inward:
            self.machine.cp(here, guest)
        else:
            self.machine.cp(guest, here)

    def scp(self, here: Path, there: str, inward: bool) -> None:  # noqa: FBT001
        self._run(["scp", "-q", "-r", "-F", self.config], here, f"guest:{there}", inward=inward)

    def rsync(self, here: Path, there: str, inward: bool) -> None:  # noqa: FBT001
        slash = "/" if "many" in there else ""  # without it a folder would be copied into the new one
        self._run(["rsync", "-a", "-W", "-e", f"ssh -F {self.config}"], f"{here}{slash}", f"guest:{there}{slash}", inward=inward)

    def _run(self, argv: list[str | Path], here: Path | str, there: str, *, inward: bool) -> None:
        subprocess.run([*argv, *((here, there) if inward else (there, here))], check=True, stdin=subprocess.DEVNULL)

    def usable(self) -> dict[str, Copy]:
        found: dict[str, Copy] = {"vm.cp": self.cp, "scp -r": self.scp}
        if shutil.which("rsync") and self._give_rsync():
            found["rsync -a"] = self.rsync
        return found

    def _give_rsync(self) -> bool:
        """Whether the guest has rsync; if not it is lent the host's, which runs where both are of one distribution."""
        if self.machine.exec("command -v rsync", check=False).ok:
            return True
        program = Path(str(shutil.which("rsync"))).resolve()
        listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.split()
        libraries = [Path(word) for word in listed if word.startswith("/")]
        self.machine.cp(program, self.machine.path("/usr/bin/rsync"))
        for library in libraries:
            if not self.machine.exec(["test", "-e", str(library)], check=False).ok:
                self.machine.cp(library.resolve(), self.machine.path(f"/usr/lib/{library.name}"))
        self.machine.exec("ldconfig")
        return self.machine.exec(["rsync", "--version"], check=False).ok


@contextmanager
def ssh_config(machine: Machine, folder: Path) -> Iterator[Path]:
    """A file with which OpenSSH knows the machine as `guest`."""
    address, port = machine.forward(22)
    keys = machine.lifecycle.instance._source.keys  # type: ignore[attr-defined]
    (folder / "key").touch(mode=0o600)
    (folder / "key").write_text(keys.user_private)
    (folder / "known").write_text(f"guest {keys.host_public}\n")
    lines = (
        ("Host", "guest"),
        ("HostName", address),
        ("Port", port),
        ("User", "root"),
        ("HostKeyAlias", "guest"),
        ("IdentityFile", folder / "key"),
        ("IdentitiesOnly", "yes"),
        ("UserKnownHostsFile", folder / "known"),
        ("StrictHostKeyChecking", "yes"),
        ("LogLevel", "ERROR"),
    )
    (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in lines))
    yield folder / "config"


def make(folder: Path, megabytes: int, files: int) -> dict[str, Path]:
    """One large file, and many of 2 kB in folders of a hundred."""
    many, large = folder / "many", folder / "large"
    with large.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1 << 20))
    for number in range(files):
        place = many / f"{number // 100:03}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number % 100:02}").write_bytes(os.urandom(2048))
    return {"large": large, "many": many}


def measure(machine: Machine, sources: dict[str, Path], programs: dict[str, Copy], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by what is copied and by which program."""
    figures: dict[str, dict[str, list[float]]] = {f"{name}, {way}": {} for name in sources for way in ("in", "out")}
    for _ in range(rounds):
        for name, source in sources.items():
            for program, copy in programs.items():
                there, back = f"/root/{name}-{secrets.token_hex(4)}", source.with_name(f"{name}-back")
                for way, here in (("in", source), ("out", back)):
                    began = time.perf_counter()
                    copy(here, there, way == "in")
                    figures[f"{name}, {way}"].setdefault(program, []).append(time.perf_counter() - began)
                    print(f"{name}, {way}, {program}: {figures[f'{name}, {way}'][program][-1]:.2f} s", file=sys.stderr)
                subprocess.run(["diff", "-r", source, back], check=True)
                subprocess.run(["rm", "-rf", back], check=True)
                machine.exec(["rm", "-rf", there], timeout=300)
    return figures


def table(figures: dict[str, dict[str, list[float]]]) -> str:
    """The medians in Markdown, and how many times as quick as scp they are."""
    names = list(next(iter(figures.values())))
    lines = [
        f"| copied | {' | '.join(f'{name}, s' for name in names)} | scp / vm.cp | aim | reached |",
        f"|---|{'---:|' * len(names)}---:|---:|---|",
    ]
    for row, seconds in figures.items():
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        ratio, aim = medians["scp -r"] / medians["vm.cp"], AIMS[row.split(",")[0]]
        cells = " | ".join(f"{median:.2f}" for median in medians.values())
        lines.append(f"| {row} | {cells} | {ratio:.1f} | {aim} | {'yes' if ratio >= aim else 'no'} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures how long copies take, next to scp and rsync.")
    parser.add_argument("-n", "--rounds", type=int, default=1, help="rounds (default: 1); scp takes minutes for each without KVM")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the large file (default: 100)")
    parser.add_argument("--files", type=int, default=10_000, help="number of small files (default: 10000)")
    parser.add_argument("--image", default="debian-12", help="what to pour (default: debian-12)")
    parser.add_argument("--catalog", type=Path, default=default_root(), help="the catalog (default: the user's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    catalog = Catalog(options.catalog.expanduser())
    backend = QemuBackend(proofs=catalog.proofs)
    settings = Settings(report=lambda line: print(line, file=sys.stderr))
    spec = MachineSpec.resolve(options.image, {})
    with (
        tempfile.TemporaryDirectory(prefix="vmbottle-copy-") as scratch,
        closing(Provisioner(catalog, backend, name="qemu", settings=settings)) as pourer,
    ):
        folder = Path(scratch)
        sources = make(folder, options.megabytes, options.files)
        with pourer.machine(spec) as machine, ssh_config(machine, folder) as config:
            programs = Programs(machine, config).usable()
            figures: dict[str, Any] = measure(machine, sources, programs, options.rounds)
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
