"""`vmbottle bisect`: the layer, the package upgrade or the command after which something fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from pytest_vmbottle.cli.command import SHORT, Failure, emit, examples, json_option, one_line, open_catalog, say
from pytest_vmbottle.cli.completion import lineages
from pytest_vmbottle.cli.travel import settings_of_environment
from pytest_vmbottle.cli.words import LeadingOptions

if TYPE_CHECKING:
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.catalog.packs import Pack
    from pytest_vmbottle.machine.machine import Machine
    from pytest_vmbottle.provision import Provisioner
    from pytest_vmbottle.standalone.bisecting import Attempt, Change, Points, Trial
    from pytest_vmbottle.standalone.capsules import Capsule

__all__ = ["bisect"]

_KEY = re.compile(r"[0-9a-f]{4,64}")
_SHOWN = 20
"""Most packages that are told."""


@click.command(
    cls=LeadingOptions,
    epilog=examples(
        "vmbottle bisect tests/conftest.py::web -- systemctl is-active nginx",
        "vmbottle bisect test_web-py-test_it -- curl -fsS http://127.0.0.1/",
        "vmbottle bisect --commands steps.sh debian-12 -- test ! -e /var/crash/now",
        "vmbottle bisect --upgrades --network tests/conftest.py::web -- nginx -t",
    ),
)
@click.argument("source", shell_complete=lineages)
@click.argument("words", metavar="COMMAND...", nargs=-1, required=True)
@click.option(
    "--commands",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Search the commands in this file, each a line for `sh -c`; empty lines and those that begin with # are left out.",
)
@click.option("--upgrades", is_flag=True, help="Search the upgrades of packages that apt offers in a Debian or Ubuntu guest, one by one.")
@click.option("--machine", metavar="NAME", help="The machine of a capsule; by default the test's own.")
@click.option("--network", is_flag=True, help="Give the machines the network, as `network=True` does.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for COMMAND, and for each command of the list; a COMMAND that takes longer has failed.",
)
@json_option
def bisect(  # noqa: PLR0913 - one for each option
    *,
    source: str,
    words: tuple[str, ...],
    commands: Path | None,
    upgrades: bool,
    machine: str | None,
    network: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Find the layer, the package upgrade or the command after which COMMAND fails.

    SOURCE is a layer (`tests/conftest.py::web`), the name of an image, the beginning of a pack's key, or a capsule. COMMAND passes with
    status 0; any other, a time-out and the end of the machine count as failed.

    The layers below SOURCE are searched, of a capsule also what the test did. With --commands or --upgrades, a machine of SOURCE runs
    these, one after the other. Each trial is in a clone, so nothing is left of the one before, and halves what is left: one of 64 commands
    is found with 6 trials, beside those of the first point, where COMMAND must pass, and the last one, where it must fail.

    Each trial is told on stderr, and the culprit on stdout. The exit status is 0 if it was found, and 1 if COMMAND fails at the first
    point already, does not fail at the last one, or something went wrong; 2 and 3 as for all commands.
    """
    from pytest_vmbottle.standalone.bisecting import Attempt

    if commands is not None and upgrades:
        raise click.UsageError("--commands and --upgrades: choose one")
    listed = _read(commands) if commands is not None else ()
    attempt = Attempt(words=words, timeout=timeout)
    with _search(source, machine, network=network) as search:
        in_list = commands is not None or upgrades
        verdict = _of_commands(search, attempt, listed or None) if in_list else _of_layers(search, attempt)
    if as_json:
        emit(verdict)
    else:
        click.echo(f"{verdict['culprit']['point']}\t{one_line(verdict['culprit']['label'])}")


def _read(file: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in file.read_text().splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise Failure(f"{file} has no commands")
    return found


@attrs.frozen(kw_only=True)
class _Search:
    """The lineage in which something is searched.

    Attributes:
        labels: Names of its packs, lowest first, and of the capsule.
        clones: Functions that start a clone of each for a block.
    """

    labels: tuple[str, ...]
    clones: tuple[Callable[[], AbstractContextManager[Machine]], ...]


def _of_layers(search: _Search, attempt: Attempt) -> dict[str, Any]:
    from pytest_vmbottle.standalone.bisecting import Layers

    if len(search.labels) == 1:
        raise Failure(f"{search.labels[0]} has no layers to search: name some commands with --commands, or use --upgrades")
    points = Layers(labels=search.labels, clones=search.clones, attempt=attempt)
    verdict = _found(points, "layer")
    changes = points.changes(verdict["culprit"]["point"])
    _tell_changes(changes)
    return verdict | {"packages": [attrs.asdict(change) for change in changes]}


def _tell_changes(changes: list[Change]) -> None:
    if changes:
        more = f" and {len(changes) - _SHOWN} more (--json has all)" if len(changes) > _SHOWN else ""
        say(f"packages that it changed: {', '.join(map(str, changes[:_SHOWN]))}{more}")


def _of_commands(search: _Search, attempt: Attempt, lines: tuple[str, ...] | None) -> dict[str, Any]:
    from pytest_vmbottle.standalone.bisecting import CommandList, upgrades_of

    with search.clones[-1]() as machine:
        kind = "command" if lines is not None else "upgrade"
        listed = lines if lines is not None else tuple(upgrades_of(machine))
        if not listed:
            raise Failure(f"apt offers no upgrades in a machine of {search.labels[-1]}: has it the lists of packages (apt-get update)?")
        points = CommandList(machine, listed, attempt, warn=say)
        return _found(points, kind)


def _found(points: Points, kind: str) -> dict[str, Any]:
    """Search, tell of each trial, and return the verdict."""
    from pytest_vmbottle.standalone.bisecting import bisect as search
    from pytest_vmbottle.standalone.bisecting import trials

    most, told = trials(len(points.labels)), []
    say(f"{_counted(len(points.labels) - 1, kind)}: at most {_counted(most, 'trial')}, beside the first point and the last one")

    def report(what: str, trial: Trial) -> None:
        told.append(trial)
        outcome = "passes" if trial.passed else f"fails, {trial.reason}"
        where = "" if trial.point == 0 else f", after {kind} {trial.point}"
        say(f"{what}{where}: {one_line(points.labels[trial.point])}: {outcome} ({trial.seconds:.1f} s)")

    found = search(points, report)
    label = points.labels[found.point]
    say(f"the culprit is {kind} {found.point} of {len(points.labels) - 1}: {one_line(label)}")
    described = [attrs.asdict(trial) | {"label": points.labels[trial.point]} for trial in told]
    return {
        "kind": kind,
        "culprit": {"point": found.point, "label": label, "reason": found.reason},
        "first": described[0],
        "last": described[1],
        "trials": described[2:],
    }


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@contextmanager
def _search(source: str, machine: str | None, *, network: bool) -> Iterator[_Search]:
    """Find the lineage of a source, whose packs stay for the block."""
    from pytest_vmbottle.backends.make import make
    from pytest_vmbottle.host.generations import Holds
    from pytest_vmbottle.images import find_declared_images
    from pytest_vmbottle.provision import Provisioner
    from pytest_vmbottle.provision import Settings as Provision

    settings = settings_of_environment()
    with ExitStack() as stack:
        catalog = stack.enter_context(closing(open_catalog()))
        name = settings.backend_for("auto")
        backend = make(name, settings, folder=catalog.root, warn=say)
        if backend is None:
            raise Failure(f"there is no backend {name!r} here")
        provision = Provision(
            timeout_factor=settings.timeout_factor,
            report=say,
            warn=say,
            declared=find_declared_images(Path.cwd()),
            memory_budget=settings.memory_budget,
            registry=settings.registry,
            registry_push=settings.registry_push,
        )
        provisioner = stack.enter_context(closing(Provisioner(catalog, backend, name=name, settings=provision)))
        capsule = _capsule(catalog, source)
        chain = _chain(catalog, _top(catalog, provisioner, source, capsule, machine))
        stack.enter_context(Holds()).take(*(pack.path for pack in chain))
        labels = [f"{pack.manifest.name} ({pack.key[:SHORT]})" for pack in chain]
        clones = [partial(_clone, provisioner, pack.key, network=network) for pack in chain]
        last = []
        if capsule is not None:
            labels.append(f"the test itself (capsule {capsule.name})")
            last = [partial(_from_capsule, provisioner, capsule, machine, network=network)]
        yield _Search(labels=tuple(labels), clones=(*clones, *last))


def _capsule(catalog: Catalog, source: str) -> Capsule | None:
    from pytest_vmbottle.standalone.capsules import CAPSULES, Capsule

    folder = Path(source) if "/" in source and "::" not in source else catalog.root / CAPSULES / source
    return Capsule(folder) if (folder / "capsule.json").is_file() else None


def _top(catalog: Catalog, provisioner: Provisioner, source: str, capsule: Capsule | None, machine: str | None) -> Pack:
    """Return the highest pack of a source."""
    from pytest_vmbottle.catalog import packs
    from pytest_vmbottle.spec import MachineSpec
    from pytest_vmbottle.standalone.orders import PACK, source_of

    if capsule is not None:
        ram = capsule.stored(machine).start.ram
        if ram is None:
            raise Failure(f"the machine of the capsule {capsule.name} was booted from its image, so there are no layers to search")
        return packs.read(packs.find(catalog.packs, packs.read(ram).key))
    key = source.removeprefix(PACK)
    if source.startswith(PACK) or (_KEY.fullmatch(source) and list(catalog.packs.glob(f"{source}*"))):
        return packs.read(packs.find(catalog.packs, key))
    return provisioner.pack(MachineSpec.resolve(source_of(source, Path.cwd()), {}))


def _chain(catalog: Catalog, top: Pack) -> list[Pack]:
    """Return the packs from the lowest one up to a pack."""
    from pytest_vmbottle.catalog import packs

    chain = [top]
    while (parent := chain[0].manifest.parent) is not None:
        packs.check_parent(chain[0])
        chain.insert(0, packs.read(catalog.pack(parent)))
    return chain


def _clone(provisioner: Provisioner, key: str, *, network: bool) -> AbstractContextManager[Machine]:
    pack, spec = provisioner.pack_of_key(key)
    spec = spec.but(files={}, network=network or spec.nat)
    return provisioner.machine(spec, start=provisioner.start(spec, pack))


def _from_capsule(provisioner: Provisioner, capsule: Capsule, machine: str | None, *, network: bool) -> AbstractContextManager[Machine]:
    stored = capsule.stored(machine)
    spec = stored.spec()
    capsule.check_fits(provisioner.fingerprint(spec), machine)
    spec = spec.but(network=network or spec.nat)
    return provisioner.machine(spec, start=stored.start, origin=stored.origin)
