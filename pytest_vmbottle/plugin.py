"""The pytest plugin: options, the `vm` mark, fixtures, and what a run says about its machines."""

from __future__ import annotations

import itertools
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import attrs
import pytest

from pytest_vmbottle import hookspec
from pytest_vmbottle._os import parse_size
from pytest_vmbottle.backend import PackKind
from pytest_vmbottle.errors import BackendUnavailable, SpecError, VMBottleError
from pytest_vmbottle.infra import PROPERTY, RETRIES, Infra, cause_of, cause_told
from pytest_vmbottle.interruption import Interruption
from pytest_vmbottle.ledger import Ledger
from pytest_vmbottle.spec import SIGNATURE, Layer, MachineSpec, Source, check_keywords, digest

if TYPE_CHECKING:
    from pytest_vmbottle.backend import Backend, Start
    from pytest_vmbottle.backends.qemu import Account
    from pytest_vmbottle.catalog import Catalog
    from pytest_vmbottle.images import DeclaredImage
    from pytest_vmbottle.lan import Lans
    from pytest_vmbottle.machine import Machine
    from pytest_vmbottle.packs import Snapshot
    from pytest_vmbottle.provision import Provisioner

_SHARED = ("session_vm", "module_vm", "class_vm")
_RESET = "_vm_reset"
_CUT_SECONDS = 2.0
_WORTH_TELLING = 1.0
"""Seconds of waiting for memory below which the summary does not mention it."""
_FIXTURES = (*_SHARED, "vm", "vms", "vm_spec", "_vm_plan", "vm_factory")

# -- options ---------------------------------------------------------------------------------------------------------------------------


@attrs.frozen
class _Option:
    name: str
    default: str
    help: str
    choices: tuple[str, ...] = ()
    flag: bool = False

    @property
    def ini(self) -> str:
        return f"vm_{self.name.replace('-', '_')}"

    @property
    def env(self) -> str:
        return f"VMBOTTLE_{self.name.replace('-', '_').upper()}"


_PACK_KINDS = ("auto", *map(str, PackKind))

_OPTIONS = (
    _Option("backend", "auto", "What runs machines: auto, qemu, smolvm, or a name that a plugin knows"),
    _Option("accel", "auto", "How QEMU runs guest code", ("auto", "kvm", "hvf", "tcg")),
    _Option("catalog", "", "Folder shared by all workers and runs (default: pytest-vmbottle in the user's cache folder)"),
    _Option(
        "missing", "", "What becomes of tests whose machine this host cannot run (default: fail if CI is set, else skip)", ("skip", "fail")
    ),
    _Option("pack", "auto", "Kind of pack that machines are poured from: template and stream have RAM, disk is booted", _PACK_KINDS),
    _Option("run-as", "", "User, or user:group, that QEMU runs as where pytest runs as root (default: root)"),
    _Option("rebuild", "", "Make all packs of this run again", flag=True),
    _Option("timeout-factor", "1", "Multiply all time-outs with this number"),
    _Option("memory-budget", "", "RAM that the machines of all workers and runs have together (default: four fifths of what is to spare)"),
    _Option("infra-retries", "1", "How often a machine that could not be provided is tried again, on a fresh one"),
    _Option("fail-on-leak", "", "Fail a run that leaves machines, folders or locks behind", flag=True),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the `--vm-*` options and their ini twins."""
    group = parser.getgroup("vmbottle", "real machines (pytest-vmbottle)")
    for option in _OPTIONS:
        text = f"{option.help}. Also {option.env} and ini {option.ini}."
        if option.flag:
            group.addoption(f"--vm-{option.name}", action="store_const", const="true", default=None, help=text)
        else:
            group.addoption(f"--vm-{option.name}", metavar="|".join(option.choices) or None, default=None, help=text)
        parser.addini(option.ini, option.help, default=None)
    parser.addini(
        "vm_smolvm_images",
        "What names of images stand for with smolvm, one `name = reference` per line; an empty reference is smolvm's own Alpine",
        type="linelist",
        default=[],
    )
    parser.addini("vm_defaults", "Defaults for the keywords of the vm mark, one `keyword = value` per line", type="linelist", default=[])


def _option(config: pytest.Config, name: str) -> str:
    """The value of an option: from the command line, the environment, the ini file, or its default."""
    option = next(each for each in _OPTIONS if each.name == name)
    given = (config.getoption(f"--vm-{name}"), os.environ.get(option.env), config.getini(option.ini))
    value = next((str(each) for each in given if each not in (None, "")), option.default)
    if option.choices and value and value not in option.choices:
        raise pytest.UsageError(f"--vm-{name} takes {' or '.join(option.choices)}, not {value!r}")
    return value


def _timeout_factor(config: pytest.Config) -> float:
    text = _option(config, "timeout-factor")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise pytest.UsageError(f"--vm-timeout-factor takes a number above 0, not {text!r}")
    return factor


def _memory_budget(config: pytest.Config) -> int | None:
    text = _option(config, "memory-budget")
    try:
        return parse_size(text) if text else None
    except SpecError as error:
        raise pytest.UsageError(f"--vm-memory-budget: {error}") from None


def _infra_retries(config: pytest.Config) -> int:
    text = _option(config, "infra-retries")
    if not text.isdecimal():
        raise pytest.UsageError(f"--vm-infra-retries takes a whole number, 0 or more, not {text!r}")
    return int(text)


def _flag(config: pytest.Config, name: str) -> bool:
    return _option(config, name).lower() not in ("", "0", "false", "no", "off")


def _account(config: pytest.Config) -> Account | None:
    """Who QEMU runs as. Nobody but root can choose that, and nobody else needs to: it may stand in an ini file for all."""
    text = _option(config, "run-as")
    if not text:
        return None
    from pytest_vmbottle.backends.qemu import Account

    try:
        account = Account.parse(text)
    except SpecError as error:
        raise pytest.UsageError(f"--vm-run-as: {error}") from None
    return account if os.geteuid() == 0 else None


def _ini_defaults(config: pytest.Config) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for line in config.getini("vm_defaults"):
        try:
            defaults.update(tomllib.loads(line))
        except tomllib.TOMLDecodeError:
            keyword, equals, value = line.partition("=")
            if not equals:
                raise pytest.UsageError(f"vm_defaults: {line!r} is not of the form keyword = value") from None
            defaults[keyword.strip()] = value.strip()
    try:
        check_keywords({key: value for key, value in defaults.items() if key != "source"})
    except SpecError as error:
        raise pytest.UsageError(f"vm_defaults: {error}") from None
    return defaults


def _smolvm_images(config: pytest.Config) -> dict[str, str]:
    images = {}
    for line in config.getini("vm_smolvm_images"):
        name, equals, reference = (part.strip() for part in line.partition("="))
        if not equals or not name:
            raise pytest.UsageError(f"vm_smolvm_images: {line!r} is not of the form name = reference")
        images[name] = reference.strip("\"'")
    return images


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Offers the hooks of `hookspec`."""
    pluginmanager.add_hookspecs(hookspec)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark and checks the options; makes nothing."""
    config.addinivalue_line("markers", f"{SIGNATURE}: run the test on a real machine made from an image or a layer.")
    for option in _OPTIONS:
        _option(config, option.name)
    _timeout_factor(config)
    _memory_budget(config)
    _infra_retries(config)
    _account(config)
    _ini_defaults(config)
    _smolvm_images(config)
    config.stash[_SESSION] = _Session(config)
    config.pluginmanager.register(_Sorting(), "vmbottle-sorting")
    config.pluginmanager.register(_Interrupted(config.stash[_SESSION]), "vmbottle-interrupted")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(config), "vmbottle-outcomes")
        config.pluginmanager.register(_Ledger(), "vmbottle-ledger")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leaves the process as it was."""
    session = config.stash.get(_SESSION, None)
    if session is not None:
        session.interruption.restore()


# -- marks -----------------------------------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class _Plan:
    """The machines that one test's marks ask for: the keywords of each by its name. Equal plans are one object."""

    wishes: Mapping[str, Mapping[str, Any]]
    label: str
    key: str


def _merged(node: pytest.Item) -> dict[str, dict[str, Any]]:
    """The keywords of all marks on a test, by the machine's name; of the same keyword the closest mark's."""
    wishes: dict[str, dict[str, Any]] = {}
    for mark in reversed(list(node.iter_markers("vm"))):
        keywords = dict(mark.kwargs)
        if len(mark.args) > 1:
            raise SpecError(f"the vm mark takes one source, not {len(mark.args)}")
        if mark.args and "source" in keywords:
            raise SpecError("the source is given twice: by place and by name")
        if mark.args:
            keywords["source"] = mark.args[0]
        check_keywords({key: value for key, value in keywords.items() if key != "source"})
        wishes.setdefault(keywords.get("name", "vm"), {}).update(keywords)
    return wishes


def _plans(node: pytest.Item) -> list[_Plan]:
    """What a test's marks come to: one plan, or one for each combination of sources that they list."""
    wishes = _merged(node) or {"vm": {}}
    choices = [[(name, source) for source in _sources(node, wish)] for name, wish in wishes.items()]
    plans = []
    for combination in itertools.product(*choices):
        chosen = {name: {**wishes[name], **({} if source is None else {"source": source})} for name, source in combination}
        for wish in chosen.values():
            if "source" in wish:  # checked together, so that a layer's keywords and the mark's are known to fit
                MachineSpec.resolve(wish["source"], {key: value for key, value in wish.items() if key != "source"})
        label = "-".join(_label(source) for _, source in combination)
        plans.append(_plan(node.config, chosen, label))
    return plans


def _plan(config: pytest.Config, wishes: Mapping[str, Mapping[str, Any]], label: str) -> _Plan:
    named = {
        name: {key: repr(sorted(value.items()) if isinstance(value, Mapping) else value) for key, value in wish.items()}
        for name, wish in wishes.items()
    }
    layers = [id(wish.get("source")) for wish in wishes.values() if isinstance(wish.get("source"), Layer)]
    key = digest(named, layers)
    return config.stash[_SESSION].plans.setdefault(key, _Plan(wishes, label, key))


def _sources(node: pytest.Item, wish: Mapping[str, Any]) -> list[Source | None]:
    source = wish.get("source")
    if source is None:
        return [None]
    sources = list(source) if isinstance(source, list | tuple) else [source]
    if not sources:
        raise SpecError("source=[]: takes at least one source")
    return [_named_layer(node, each) if isinstance(each, str) else each for each in sources]


def _named_layer(node: pytest.Item, name: str) -> Source:
    """The layer of this name in the test's module or in a conftest above it; else the name is an image's."""
    module = getattr(node, "module", None)
    conftests = [
        plugin
        for plugin in node.config.pluginmanager.get_plugins()
        if Path(str(getattr(plugin, "__file__", None) or "")).name == "conftest.py" and Path(plugin.__file__).parent in node.path.parents
    ]
    conftests.sort(key=lambda plugin: len(Path(plugin.__file__).parts), reverse=True)
    for place in (module, *conftests):
        found = getattr(place, name, None) if name.isidentifier() else None
        if isinstance(found, Layer):
            return found
    return name


def _label(source: Source | None) -> str:
    if isinstance(source, Layer):
        return source.name
    return Path(source).stem if isinstance(source, Path) else str(source or "vm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives a test its plan as a parameter; only a list of sources shows in the node id."""
    names = [name for name in (*_SHARED, "_vm_plan") if name in metafunc.fixturenames]
    if not names:
        return
    try:
        plans = _plans(metafunc.definition)
    except SpecError:
        return  # told in pytest_collection_modifyitems, for all tests together
    single = len(plans) == 1
    ids = [pytest.HIDDEN_PARAM if single else plan.label for plan in plans]
    for name in names if single else names[:1]:
        metafunc.parametrize(name, plans, indirect=True, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses wrong marks, all of them at once, before anything runs."""
    session = config.stash[_SESSION]
    for item in items:
        _plan_reset(item)
        if item.get_closest_marker("vm") is not None:
            try:
                _plans(item)
            except SpecError as error:
                told = str(error) if SIGNATURE in str(error) else f"{error}\n  the signature is {SIGNATURE}"
                session.problems.update(dict.fromkeys(("wrong vm marks:", f"{item.nodeid}: {told}")))
    if not session.problems:
        return
    if not hasattr(config, "workerinput"):
        raise session.misuse()
    items.clear()  # xdist takes a usage error in a worker for a crash: its controller raises it, see pytest_sessionfinish


def _plan_reset(item: pytest.Item) -> None:
    """Has a test that uses a shared machine look whether it is to be fresh, as soon as the machine is there."""
    names: list[str] = getattr(item, "fixturenames", [])
    shared = [index for index, name in enumerate(names) if name in _SHARED]
    if shared and _RESET not in names:
        names.insert(shared[-1] + 1, _RESET)


def _uses_machine(item: pytest.Item) -> bool:
    return item.get_closest_marker("vm") is not None or bool(set(_FIXTURES) & set(getattr(item, "fixturenames", ())))


class _Sorting:
    """Brings tests that share a session's machine next to each other, after all others have had their say about the order."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Sorts the tests that use `session_vm`, stably, among the places they have; all other tests stay where they are."""
        places = [index for index, item in enumerate(items) if "session_vm" in getattr(item, "fixturenames", ())]
        first: dict[str, int] = {}
        for index in places:
            first.setdefault(_session_key(items[index]), index)
        ordered = sorted((items[index] for index in places), key=lambda item: first[_session_key(item)])
        for index, item in zip(places, ordered, strict=True):
            items[index] = item
        # Only now it is known which tests are left: for none that uses a machine, nothing is asked of this host.
        session = config.stash[_SESSION]
        session.has_machines = any(_uses_machine(item) for item in items)
        if session.has_machines and not _is_only_asked(config):
            _check_declared_images(config, items)
            session.interruption.install()
            _tell_controller(config)
            session.unable = _leave_out_what_cannot_be(config, items)


def _leave_out_what_cannot_be(config: pytest.Config, items: list[pytest.Item]) -> dict[str, int]:
    """Skips the tests whose machine their backend cannot make whatever the host, or has them fail; how many, by what it cannot."""
    unable: dict[str, int] = {}
    for item in items:
        why = _refusal(item)
        if why is not None:
            unable[why] = unable.get(why, 0) + 1
            if _missing(config) == "skip":
                item.add_marker(pytest.mark.skip(reason=why))
    return unable


def _refusal(item: pytest.Item) -> str | None:
    """Why the backend cannot make a machine that the marks of a test ask for, as far as they tell."""
    if item.get_closest_marker("vm") is None:
        return None
    session, defaults = item.config.stash[_SESSION], _ini_defaults(item.config)
    plan = next((given for name in (*_SHARED, "_vm_plan") if isinstance(given := _given(item, name), _Plan)), None)
    for wish in plan.wishes.values() if plan is not None else ():
        keywords = {"source": "", **defaults, **wish}
        session.wanted.add(session.backend_name(keywords.get("backend", "auto")))
        source = keywords.pop("source") or session.stand_in
        with suppress(SpecError, VMBottleError, pytest.UsageError):
            spec = MachineSpec.resolve(source, keywords)
            why = session.refusal(spec)
            if why is not None:
                return why
    return None


def _missing(config: pytest.Config) -> str:
    return _option(config, "missing") or ("fail" if os.environ.get("CI") else "skip")


def _check_declared_images(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses wrong declarations of images before anything runs."""
    session = config.stash[_SESSION]
    try:
        _ = session.declared
    except SpecError as error:
        session.has_machines = False
        session.problems[str(error)] = None
        if not hasattr(config, "workerinput"):
            raise session.misuse() from None
        items.clear()  # as for wrong marks


def _session_key(item: pytest.Item) -> str:
    plan = _given(item, "session_vm")
    return plan.key if isinstance(plan, _Plan) else ""


def _given(node: object, name: str) -> object:
    """The parameter that a test got for a fixture, if any."""
    callspec = getattr(node, "callspec", None)
    return None if callspec is None else callspec.params.get(name)


class _Interrupted:
    """Ends the machines of a run that was interrupted before anything is told or torn down: there may be little time for that."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Ends them; to describe where the run was interrupted takes pytest a while."""
        self._session.cut()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Ends them; a teardown that still uses one is told that it is off."""
        if session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR):
            self._session.cut()


# -- the run ---------------------------------------------------------------------------------------------------------------------------


class _Session:
    """What one pytest process knows: its provisioners, made when the first machine is asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._provisioners: dict[str, Provisioner] = {}
        self._backends: dict[str, Backend] = {}
        self._catalog: Catalog | None = None
        self._began = time.time()
        self.plans: dict[str, _Plan] = {}
        self.has_machines = False
        self.interruption = Interruption()
        self._flag = -1
        self.problems: dict[str, None] = {}
        self.told: dict[str, None] = {}
        self.tallies: list[dict[str, float]] = []
        self.infra = Infra()
        self.ledger = Ledger()
        self.machines: list[Machine] = []
        self.blamed: set[str] = set()
        self.unable: dict[str, int] = {}
        self.wanted: set[str] = set()
        self._used: WeakSet[Machine] = WeakSet()

    @property
    def catalog(self) -> Catalog:
        # Imported here and not above: a suite without machines pays nothing for what they need (psutil, paramiko, asyncio).
        from pytest_vmbottle.catalog import Catalog, default_root

        if self._catalog is None:
            given = _option(self._config, "catalog")
            self._catalog = Catalog(Path(given).expanduser() if given else default_root())
        return self._catalog

    def flag(self) -> str:
        """The path of a file without a name; workers write to it if they have tests with machines, since their controller collects none."""
        if self._flag < 0:
            self._flag = os.memfd_create("vmbottle", os.MFD_CLOEXEC)
        return f"/proc/{os.getpid()}/fd/{self._flag}"

    @property
    def is_flagged(self) -> bool:
        """Whether a worker has tests with machines."""
        return self._flag >= 0 and os.fstat(self._flag).st_size > 0

    def clean_up(self) -> None:
        """Sees to what processes left that are dead, workers and their supervisors among them; does nothing in a run without machines."""
        if self._catalog is not None or self.is_flagged:
            with suppress(VMBottleError):  # of a catalog that cannot be used, all that needed it has been told
                self.catalog.gc()

    def cut(self) -> None:
        """Ends all machines at once, beside each other."""
        import threading

        def end(machine: Machine) -> None:
            with suppress(VMBottleError):
                machine.power_cut()

        threads = [threading.Thread(target=end, args=(machine,), daemon=True) for machine in self.machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_CUT_SECONDS)

    @cached_property
    def declared(self) -> dict[str, DeclaredImage]:
        """The images that the project declares."""
        from pytest_vmbottle.images import find_declared_images

        # Without an ini file pytest may take a folder for its root that has little to do with the project.
        return find_declared_images(self._config.rootpath) or find_declared_images(self._config.invocation_params.dir)

    stand_in = "any"
    """A source for who only wants to know whether the rest of a spec can be."""

    def backend_name(self, wanted: str) -> str:
        """The backend that is meant; `"auto"` is what the option says, and by default QEMU."""
        asked = _option(self._config, "backend") if wanted == "auto" else wanted
        return "qemu" if asked == "auto" else asked

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            backend: Backend | None = self._config.hook.pytest_vmbottle_make_backend(config=self._config, name=name)
            if backend is None:
                raise SpecError(f"there is no backend {name!r}: choose qemu or smolvm, or install the plugin that brings it")
            self._backends[name] = backend
        return self._backends[name]

    def refusal(self, spec: MachineSpec) -> str | None:
        """Why the backend of a spec makes no machine like that, whatever the host; None if it does."""
        from pytest_vmbottle.backend import Selective

        backend = self._backend(self.backend_name(spec.backend))
        return backend.refusal(spec) if isinstance(backend, Selective) else None

    def provisioner(self, wanted: str) -> Provisioner:
        """What gives out machines of a backend."""
        from pytest_vmbottle.provision import Provisioner, Settings

        name = self.backend_name(wanted)
        if name not in self._provisioners:
            backend = self._backend(name)
            settings = Settings(
                timeout_factor=_timeout_factor(self._config),
                rebuild_before=self._began if _flag(self._config, "rebuild") else None,
                report=self.say,
                warn=self.say,
                ready=lambda machine: self._config.hook.pytest_vmbottle_machine_ready(machine=machine),
                stopping=lambda machine: self._config.hook.pytest_vmbottle_machine_stopping(machine=machine),
                declared=self.declared,
                memory_budget=_memory_budget(self._config),
                retries=_infra_retries(self._config),
            )
            self._provisioners[name] = Provisioner(self.catalog, backend, name=name, settings=settings)
        return self._provisioners[name]

    def freshen(self, machine: Machine) -> None:
        """Takes a shared machine that an earlier test had back to where it began, if its spec says so."""
        if machine.spec.reset == "test" and machine in self._used:
            try:
                machine.restore()
            except VMBottleError as error:
                error.infra = True
                raise
            self.blamed.discard(machine.id)
        self._used.add(machine)

    def say(self, line: str) -> None:
        """Writes a line to the terminal at once, also from a worker, whatever is being captured."""
        capture = self._config.pluginmanager.getplugin("capturemanager")
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        worker = getattr(self._config, "workerinput", None)
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            if worker is not None:
                # A worker's own streams lead nowhere, so it is told where the controller's terminal is.
                with suppress(OSError), open(worker.get("vmbottle_terminal", os.devnull), "a") as stream:  # noqa: PTH123
                    stream.write(f"\nvmbottle: {line}\n")
            elif reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(f"vmbottle: {line}")

    def describe_hosts(self) -> dict[str, None]:
        """One line for each backend that is asked for: what machines run on, and why."""
        return {self._describe_host(name): None for name in sorted(self.wanted or {self.backend_name("auto")})}

    def _describe_host(self, name: str) -> str:
        from pytest_vmbottle.catalog import default_reason

        try:
            able = self.provisioner(name).capabilities
        except (VMBottleError, pytest.UsageError) as error:
            return f"vmbottle: no machine can be run here: {error}"
        runs_on = f"{able.backend} ({able.version}), {able.accelerator} [{able.reason}]"
        why = "" if _option(self._config, "catalog") else default_reason()
        return f"vmbottle: {runs_on}, {able.pack_kind} packs, catalog {self.catalog.root}{f' ({why})' if why else ''}"

    def misuse(self) -> pytest.UsageError:
        """What is wrong with the marks of all tests, or with the project's images."""
        return pytest.UsageError("\n".join(self.problems))

    def collect(self) -> None:
        """Adds up what this process did, and ends its provisioners."""
        for provisioner in self._provisioners.values():
            provisioner.close()
            self.tallies.append(attrs.asdict(provisioner.tally))
            self.told.update(self.describe_hosts())
        self._provisioners.clear()
        if self._catalog is not None:
            self._catalog.close()
            self.ledger.add(self._catalog.ledger.sent())
            self._catalog = None


_SESSION: pytest.StashKey[_Session] = pytest.StashKey()


@pytest.hookimpl(trylast=True)
def pytest_vmbottle_make_backend(config: pytest.Config, name: str) -> Backend | None:
    """Makes the backends of this package."""
    kind = _option(config, "pack")
    forced = None if kind == "auto" else PackKind(kind)
    session = config.stash[_SESSION]
    if name == "smolvm":
        from pytest_vmbottle.backends.smolvm import SmolvmBackend

        root, images = session.catalog.root, _smolvm_images(config)
        return SmolvmBackend(state=root / "smolvm", proofs=root / "proofs", pack_kind=forced, images=images, warn=session.say)
    if name != "qemu":
        return None
    from pytest_vmbottle.backends.qemu import QemuBackend

    return QemuBackend(accelerator=_option(config, "accel"), pack_kind=forced, account=_account(config), proofs=session.catalog.proofs)


_ONLY_ASKED = ("collectonly", "setupplan", "showfixtures", "show_fixtures_per_test")  # options with which no test is run


def _is_only_asked(config: pytest.Config) -> bool:
    return any(config.getoption(name, default=False) for name in _ONLY_ASKED)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Says what machines run on, if there are any to run."""
    session = config.stash[_SESSION]
    if not session.has_machines or _is_only_asked(config):
        return []
    session.told.update(session.describe_hosts())
    becomes = "are skipped" if _missing(config) == "skip" else "fail"
    unable = [f"vmbottle: {count} tests {becomes}: {why}" for why, count in session.unable.items()]
    return [*session.told, *unable]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands what a worker knows to the controller, which refuses the wrong marks that its workers have found."""
    ours = session.config.stash[_SESSION]
    output = getattr(session.config, "workeroutput", None)
    if output is None:
        ours.clean_up()
    ours.collect()
    if output is not None:
        output["vmbottle"] = {
            "tallies": ours.tallies,
            "told": list(ours.told),
            "problems": list(ours.problems),
            "ledger": ours.ledger.sent(),
        }
    elif ours.problems and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ours.misuse()
    elif ours.ledger.left and session.exitstatus == pytest.ExitCode.OK and _flag(session.config, "fail-on-leak"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker where its words about long work are seen."""
    capture = node.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        node.workerinput["vmbottle_terminal"] = f"/proc/{os.getpid()}/fd/{os.dup(2)}"
    node.workerinput["vmbottle_flag"] = node.config.stash[_SESSION].flag()


def _tell_controller(config: pytest.Config) -> None:
    """Has the controller know that there are tests with machines."""
    flag = getattr(config, "workerinput", {}).get("vmbottle_flag")
    if flag is not None:
        with suppress(OSError):
            Path(flag).write_text("machines")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any) -> None:
    """Makes the controller end in order too, if its workers have machines."""
    ours = node.config.stash[_SESSION]
    if ours.is_flagged:
        ours.interruption.install()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Takes what a worker knows, and sees to what it left if it crashed."""
    output = getattr(node, "workeroutput", {}).get("vmbottle", {})
    ours = node.config.stash[_SESSION]
    if error:
        ours.clean_up()
    ours.tallies.extend(output.get("tallies", ()))
    ours.told.update(dict.fromkeys(output.get("told", ())))
    ours.problems.update(dict.fromkeys(output.get("problems", ())))
    ours.ledger.add(output.get("ledger", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says what became of machines and packs."""
    ours = config.stash[_SESSION]
    total = {key: sum(tally[key] for tally in ours.tallies) for key in (ours.tallies or [{}])[0]}
    if any(total.values()):
        if hasattr(config.option, "dist") and config.option.dist != "no":
            for line in ours.told:
                terminalreporter.write_line(line)
        terminalreporter.write_line(
            f"vmbottle: {total['poured']:.0f} machines poured, {total['booted']:.0f} booted; {total['built']:.0f} packs built, "
            f"{total['reused']:.0f} reused; {total['waited']:.1f} s spent waiting for machines"
            + (f", {total['queued']:.1f} s of it for memory" if total["queued"] >= _WORTH_TELLING else "")
        )
    infra = ours.infra.summary(int(total.get("retried", 0)))
    if infra:
        terminalreporter.write_line(f"vmbottle: {infra}", red=True)


class _Ledger:
    """Has the last words of a run, after all other summaries."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
        """Says what the run made, kept, reclaimed and left behind."""
        yield
        ledger = config.stash[_SESSION].ledger
        for line in ledger.lines():
            terminalreporter.write_line(f"vmbottle: {line}", red=line.startswith("LEAK"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Shows a machine that could not be provided as what it is: the cause in words, without our own stack."""
    cause = cause_of(call.excinfo.value if call.excinfo else None)
    if cause and (PROPERTY, cause) not in item.user_properties:
        item.user_properties.append((PROPERTY, cause))
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if cause:
        setattr(report, PROPERTY, cause)
    if call.when == "call":
        _fail_for_panics(report, item.config.stash[_SESSION])
    if (
        call.when == "setup"
        and call.excinfo is not None
        and isinstance(call.excinfo.value, VMBottleError)
        and not item.config.option.fulltrace
    ):
        report.longrepr = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
    return report  # type: ignore[return-value]


class _Outcomes:
    """Tells INFRA apart where reports are shown: in the only process, or in the controller of several."""

    def __init__(self, config: pytest.Config) -> None:
        self._infra, self._in_full = config.stash[_SESSION].infra, config.option.fulltrace

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test without a machine, before anybody shows or stores it."""
        self._infra.take(report, in_full=self._in_full)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: Any) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
    """Gives a test without a machine a letter and a word of its own, among the errors."""
    return ("error", "I", ("INFRA", {"red": True})) if isinstance(report, pytest.TestReport) and cause_told(report) else None


def _fail_for_panics(report: pytest.TestReport, session: _Session) -> None:
    """Fails a test that passed although the kernel of a machine was in trouble; a machine counts in the first test that sees it."""
    for machine in session.machines:
        panic = machine.panic if machine.spec.panic == "fail" else None
        if not panic or machine.id in session.blamed:
            continue
        session.blamed.add(machine.id)
        if report.passed:
            report.outcome = "failed"
            report.longrepr = (
                f"The test passed, but the kernel of its machine {machine.name!r} was in trouble: {panic}\n"
                'If that is what the test wants, say panic="expected" in the mark.'
            )
            report.sections.append((f"console of {machine.name}", machine.console.tail(40)))


# -- fixtures --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vm_defaults(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Defaults for the keywords of the vm mark, from the ini file. Override it, session-scoped, to add your own."""
    return _ini_defaults(request.config)


@pytest.fixture(scope="session")
def vm_catalog(request: pytest.FixtureRequest) -> Catalog:
    """The folder that holds images and packs, shared by all workers and runs."""
    return request.config.stash[_SESSION].catalog


@pytest.fixture
def _vm_plan(request: pytest.FixtureRequest) -> _Plan:
    plan = getattr(request, "param", None) or next((_given(request.node, name) for name in _SHARED if _given(request.node, name)), None)
    if isinstance(plan, _Plan):
        return plan
    return _plans(request.node)[0]  # asked for by getfixturevalue, where nothing was parametrised


@pytest.fixture
def vm_spec(request: pytest.FixtureRequest, _vm_plan: _Plan, vm_defaults: dict[str, Any]) -> MachineSpec:
    """What the test's machine is to be, complete. Parametrise it (or `vm`) indirectly with a source, keywords, or a `MachineSpec`."""
    given = getattr(request, "param", None) or _given(request.node, "vm")
    if isinstance(given, MachineSpec):
        return given
    wish = dict(_vm_plan.wishes.get("vm") or next(iter(_vm_plan.wishes.values())))
    if given is not None:
        wish.update(given if isinstance(given, Mapping) else {"source": given})
    return _resolve(request.config, wish, vm_defaults, request.node)


def _resolve(config: pytest.Config, wish: Mapping[str, Any], defaults: Mapping[str, Any], item: pytest.Item | None) -> MachineSpec:
    keywords = dict(wish)
    backend = keywords.get("backend", defaults.get("backend", "auto"))
    if config.stash[_SESSION].backend_name(backend) == "smolvm":
        keywords.setdefault("source", defaults.get("source", "smolvm"))
    if "source" not in keywords and "source" not in defaults:
        raise SpecError('no machine is described: mark the test with @pytest.mark.vm("debian-12"), or set vm_defaults = source = debian-12')
    keywords.setdefault("source", defaults.get("source"))
    changed = config.hook.pytest_vmbottle_spec(item=item, keywords=keywords)
    keywords = dict(changed if changed is not None else keywords)
    source = keywords.pop("source")
    if isinstance(source, str) and item is not None:
        source = _named_layer(item, source)
    return MachineSpec.resolve(source, keywords, defaults={key: value for key, value in defaults.items() if key != "source"})


@pytest.fixture
def _vm_lans() -> Iterator[Lans]:
    """The private LANs of a test, which outlast its machines."""
    from pytest_vmbottle.lan import Lans

    with closing(Lans()) as lans:
        yield lans


@pytest.fixture
def vms(
    request: pytest.FixtureRequest, _vm_plan: _Plan, vm_spec: MachineSpec, vm_defaults: dict[str, Any], _vm_lans: Lans
) -> Iterator[dict[str, Machine]]:
    """The test's machines by name, each fresh: one for each `name=` among its vm marks."""
    with ExitStack() as stack:
        primary = "vm" if "vm" in _vm_plan.wishes else next(iter(_vm_plan.wishes))
        specs = {
            name: vm_spec if name == primary else _resolve(request.config, wish, vm_defaults, request.node)
            for name, wish in _vm_plan.wishes.items()
        }
        yield {name: _enter(request, stack, spec, _vm_lans) for name, spec in specs.items()}


@pytest.fixture
def vm(vms: dict[str, Machine]) -> Machine:
    """The test's own machine: fresh, running, and gone after the test."""
    return vms.get("vm") or next(iter(vms.values()))


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, vm_defaults: dict[str, Any], _vm_lans: Lans) -> Iterator[Callable[..., Machine]]:
    """Starts more machines: `vm_factory(source, **keywords)`. They end with the test, last first. A snapshot is a source too."""
    with ExitStack() as stack:

        def make(source: Source | MachineSpec | Snapshot, **keywords: Any) -> Machine:
            from pytest_vmbottle.packs import Snapshot

            if isinstance(source, Snapshot):
                return _enter(request, stack, source.of(**keywords), _vm_lans, source.start)
            if isinstance(source, MachineSpec):
                spec = attrs.evolve(source, **{"env": dict(source.env), "files": dict(source.files), **keywords})
            else:
                spec = _resolve(request.config, {"source": source, **keywords}, vm_defaults, request.node)
            return _enter(request, stack, spec, _vm_lans)

        yield make


def _shared(request: pytest.FixtureRequest, defaults: dict[str, Any]) -> Iterator[Machine]:
    plan = getattr(request, "param", None)
    wish = {} if plan is None else plan.wishes.get("vm") or next(iter(plan.wishes.values()))
    with ExitStack() as stack:
        yield _enter(request, stack, _resolve(request.config, wish, defaults, None))


@pytest.fixture(scope="class")
def class_vm(request: pytest.FixtureRequest, vm_defaults: dict[str, Any]) -> Iterator[Machine]:
    """A machine shared by the tests of a class."""
    yield from _shared(request, vm_defaults)


@pytest.fixture(scope="module")
def module_vm(request: pytest.FixtureRequest, vm_defaults: dict[str, Any]) -> Iterator[Machine]:
    """A machine shared by the tests of a module."""
    yield from _shared(request, vm_defaults)


@pytest.fixture(scope="session")
def session_vm(request: pytest.FixtureRequest, vm_defaults: dict[str, Any]) -> Iterator[Machine]:
    """A machine shared by all tests that ask for the same one, per worker."""
    yield from _shared(request, vm_defaults)


@pytest.fixture
def _vm_reset(request: pytest.FixtureRequest) -> None:
    for name in _SHARED:
        if name in request.fixturenames:
            request.config.stash[_SESSION].freshen(request.getfixturevalue(name))


def _enter(
    request: pytest.FixtureRequest, stack: ExitStack, spec: MachineSpec, lans: Lans | None = None, start: Start | None = None
) -> Machine:
    session = request.config.stash[_SESSION]
    try:
        with _counting_retries(request, session.provisioner(spec.backend)) as provisioner:
            machine = stack.enter_context(provisioner.machine(spec, start=start, lans=lans))
    except BackendUnavailable as error:
        if _missing(request.config) == "fail":
            raise
        pytest.skip(f"no machine can be run here: {error}")
    session.machines.append(machine)
    stack.callback(session.machines.remove, machine)
    return machine


@contextmanager
def _counting_retries(request: pytest.FixtureRequest, provisioner: Provisioner) -> Iterator[Provisioner]:
    """Notes with a test how many machines more than one had to be started for it."""
    before = provisioner.tally.retried
    try:
        yield provisioner
    finally:
        properties = getattr(request.node, "user_properties", None)  # a class, a module and a session have none
        if properties is not None and provisioner.tally.retried > before:
            properties.append((RETRIES, str(provisioner.tally.retried - before)))
