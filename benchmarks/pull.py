"""Time to a first machine where there is nothing but a registry, next to a boot; and bytes on the wire.

Debian's docker-registry on the loopback gets the packs of an image and of a small layer on it. Then pulls into empty catalogs, each to the
first command of a clone, and boots of the same machine take turns, so that other work on the computer falls on both. It exits with 1 if
a bar is missed.

    python benchmarks/pull.py --catalog ~/.cache/pytest-vmbottle -n 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pytest_vmbottle import Layer, Machine, MachineSpec, layer  # noqa: E402
from pytest_vmbottle.backends.qemu import QemuBackend  # noqa: E402
from pytest_vmbottle.catalog.catalog import Catalog  # noqa: E402
from pytest_vmbottle.catalog.location import default_root  # noqa: E402
from pytest_vmbottle.catalog.packs import Pack  # noqa: E402
from pytest_vmbottle.host.sizes import format_size  # noqa: E402
from pytest_vmbottle.provision import Provisioner, Settings  # noqa: E402
from pytest_vmbottle.spec.reference import Reference  # noqa: E402
from pytest_vmbottle.travel.exchange import Exchange  # noqa: E402
from pytest_vmbottle.travel.packs import image_of  # noqa: E402
from pytest_vmbottle.travel.run_registry import RunRegistry, open_exchange  # noqa: E402
from tests.registries import docker_registry  # noqa: E402

MIB = 1 << 20


@attrs.frozen
class Bar:
    """A figure, and the most that it may be."""

    name: str
    figure: float
    most: float
    unit: str

    def __str__(self) -> str:
        return f"{self.name}: {self.figure:.2f}{self.unit}, at most {self.most:g}{self.unit}: {'yes' if self.figure <= self.most else 'NO'}"


def say(line: str) -> None:
    print(line, file=sys.stderr)


def to_first_command(provisioner: Provisioner, spec: MachineSpec) -> float:
    began = time.perf_counter()
    with closing(provisioner), provisioner.machine(spec) as machine:
        machine.exec(["true"])
        return time.perf_counter() - began


def small_layer(image: str) -> Layer:
    @layer(image)
    def web(vm: Machine) -> None:
        vm.path("/srv/index.html").write_text("hello\n")
        vm.exec("systemd-run --unit=web python3 -m http.server --directory /srv 80")
        vm.wait_for_port(80)

    return web


class Benchmark:
    """Packs in a registry, and the times of one run in seconds."""

    def __init__(self, catalog: Catalog, options: argparse.Namespace, registry: str, folder: Path) -> None:
        self.pulls: list[float] = []
        self.layers: list[float] = []
        self.boots: list[float] = []
        self._catalog, self._registry, self._folder = catalog, registry, folder
        # Whatever this computer is asked once is known to all provisioners alike.
        self._backend = QemuBackend(proofs=catalog.proofs)
        self._spec = MachineSpec.resolve(options.image, {"memory": options.memory})
        self._layered = MachineSpec.resolve(small_layer(options.image), {"memory": options.memory})

    def push(self) -> dict[str, int]:
        """Upload the packs; return the bytes of their artifacts."""
        with closing(self._provisioner(self._catalog)) as provisioner:
            packs = {"layer": provisioner.pack(self._layered), "pack": provisioner.pack(self._spec)}
        exchange = open_exchange(Reference.parse(self._registry), self._catalog, self._backend.fingerprint, say)
        registry = RunRegistry(exchange, push=True, replace=False, warn=sys.exit)
        for pack in packs.values():
            registry.push_pack(pack)
        return {name: self._size(exchange, f"pack-{pack.key}") for name, pack in packs.items()} | {
            "image": self._image(exchange, packs["pack"])
        }

    def round(self) -> None:
        for spec, seconds in ((self._spec, self.pulls), (self._layered, self.layers)):
            with tempfile.TemporaryDirectory(dir=self._folder) as empty, closing(Catalog(Path(empty))) as catalog:
                seconds.append(to_first_command(self._provisioner(catalog, self._registry), spec))
        self.boots.append(to_first_command(self._provisioner(self._catalog), attrs.evolve(self._spec, env={}, files={}, fresh="boot")))

    def _provisioner(self, catalog: Catalog, registry: str = "") -> Provisioner:
        return Provisioner(catalog, self._backend, name="qemu", settings=Settings(report=say, warn=sys.exit, registry=registry))

    def _image(self, exchange: Exchange, pack: Pack) -> int:
        image = image_of(self._catalog, pack.manifest)
        return self._size(exchange, f"image-{image.key}") if image is not None else 0

    def _size(self, exchange: Exchange, tag: str) -> int:
        artifact = exchange.repository.find(tag)
        if artifact is None:
            sys.exit(f"the registry has no {tag}")
        return artifact.size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures how long a machine takes whose packs are in a registry, next to a boot.")
    parser.add_argument("-n", "--rounds", type=int, default=3, help="pulls and boots (default: 3)")
    parser.add_argument("--image", default="debian-12", help="what to pull (default: debian-12)")
    parser.add_argument("--memory", default="1G", help="RAM of the machines (default: 1G)")
    parser.add_argument(
        "--catalog", type=Path, default=default_root(), help="where the packs are, or are made (default: the user's catalog)"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="vmbottle-pull-", dir="/var/tmp") as scratch, closing(Catalog(options.catalog)) as catalog:
        folder = Path(scratch)
        (folder / "registry").mkdir()
        with docker_registry(folder / "registry") as registry:
            benchmark = Benchmark(catalog, options, f"{registry.host}/team/packs", folder)
            sizes = benchmark.push()
            for _ in range(options.rounds):
                benchmark.round()
    pull, layered, boot = (statistics.median(seconds) for seconds in (benchmark.pulls, benchmark.layers, benchmark.boots))
    print(f"on the wire: {', '.join(f'{name} {format_size(size)}' for name, size in sizes.items())}")
    print(f"to the first command: pulled pack {pull:.1f} s, pulled layer {layered:.1f} s, boot {boot:.1f} s (medians of {options.rounds})")
    bars = (
        Bar("the image's pack on the wire", sizes["pack"] / MIB, 80, " MiB"),
        Bar("a small layer's pack on the wire", sizes["layer"] / MIB, 15, " MiB"),
        Bar("pull / boot", pull / boot, 0.25, ""),
    )
    print(*bars, sep="\n")
    sys.exit(any(bar.figure > bar.most for bar in bars))


if __name__ == "__main__":
    main()
