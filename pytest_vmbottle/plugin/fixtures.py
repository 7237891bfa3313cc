"""Fixtures that give a test its machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any, Unpack

import pytest

from pytest_vmbottle.errors import BackendUnavailable, ImageMissing, SpecError
from pytest_vmbottle.plugin.collection import resolve
from pytest_vmbottle.plugin.infra import RETRIES
from pytest_vmbottle.plugin.plans import SHARED, Plan, near_layers, parameter, plan_of, plans_of
from pytest_vmbottle.plugin.session import SESSION
from pytest_vmbottle.spec import MachineKeywords, MachineSpec, Source

if TYPE_CHECKING:
    from pytest_vmbottle.backends.port import Start
    from pytest_vmbottle.catalog.catalog import Catalog
    from pytest_vmbottle.machine.crash_explorer import CrashLog
    from pytest_vmbottle.machine.lan import Lans
    from pytest_vmbottle.machine.machine import Machine, MachineFactory
    from pytest_vmbottle.machine.snapshot import HasSnapshot, Snapshot
    from pytest_vmbottle.plugin.baselines import Benchmark
    from pytest_vmbottle.plugin.kernel_tests import KernelTests
    from pytest_vmbottle.provision import Provisioner
    from pytest_vmbottle.provision.origins import Origin
    from pytest_vmbottle.standalone.capsules import Capsule


@pytest.fixture(scope="session")
def vm_defaults(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Defaults for the keywords of the vm mark, from the ini file. Override it, session-scoped, to add your own."""
    return dict(request.config.stash[SESSION].options.defaults)


@pytest.fixture(scope="session")
def vm_catalog(request: pytest.FixtureRequest) -> Catalog:
    """The folder that holds images and packs, shared by all workers and runs."""
    return request.config.stash[SESSION].catalog


@pytest.fixture
def _vm_plan(request: pytest.FixtureRequest) -> Iterator[Plan]:
    plan = plan_of(request.node)
    # Checked after the test: a mark that is added while it runs comes too late for its machine.
    yield plan
    _check_kept(request, plan, "vm")


@pytest.fixture
def vm_spec(request: pytest.FixtureRequest, _vm_plan: Plan, vm_defaults: dict[str, Any]) -> MachineSpec:
    """Complete spec of the test's machine. Parametrise it (or `vm`) indirectly with a source, keywords, or a `MachineSpec`."""
    given = getattr(request, "param", None) or parameter(request.node, "vm")
    if isinstance(given, MachineSpec):
        return given
    # A copy: the marks of a test are shared by all its parameters.
    wish = dict(_vm_plan.wishes[_vm_plan.primary])
    if given is not None:
        wish.update(given if isinstance(given, Mapping) else {"source": given})
    return resolve(request.config, wish, vm_defaults, request.node)


@pytest.fixture
def _vm_lans() -> Iterator[Lans]:
    """The private LANs of a test, which outlast its machines."""
    from pytest_vmbottle.machine.lan import Lans

    with closing(Lans()) as lans:
        yield lans


@pytest.fixture
def vms(
    request: pytest.FixtureRequest, _vm_plan: Plan, vm_spec: MachineSpec, vm_defaults: dict[str, Any], _vm_lans: Lans
) -> Iterator[dict[str, Machine]]:
    """The test's machines by name, each of them fresh: one for each `name=` in its vm marks."""
    with ExitStack() as stack:
        # All specs are resolved before the first machine starts: a mistake in one of them costs no time.
        specs = {
            name: vm_spec if name == _vm_plan.primary else resolve(request.config, wish, vm_defaults, request.node)
            for name, wish in _vm_plan.wishes.items()
        }
        # One after the other, so that machines on a LAN get their addresses in the same order each time.
        yield {name: _enter(request, stack, spec, _vm_lans) for name, spec in specs.items()}


@pytest.fixture
def vm(vms: dict[str, Machine], _vm_plan: Plan) -> Machine:
    """The test's own machine: fresh, running, and removed after the test."""
    return vms[_vm_plan.primary]


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, vm_defaults: dict[str, Any], _vm_lans: Lans) -> Iterator[MachineFactory]:
    """Function to start more machines: `vm_factory(source, **keywords)`. They end with the test, last first. A snapshot is a source too."""
    with ExitStack() as stack:
        yield _factory(request, stack, vm_defaults, _vm_lans)


@pytest.fixture(scope="class")
def class_vm_factory(request: pytest.FixtureRequest, vm_defaults: dict[str, Any]) -> Iterator[MachineFactory]:
    """Function to start machines that the tests of a class share, as `vm_factory` does. They end with the class."""
    yield from _shared_factory(request, vm_defaults)


@pytest.fixture(scope="module")
def module_vm_factory(request: pytest.FixtureRequest, vm_defaults: dict[str, Any]) -> Iterator[MachineFactory]:
    """Function to start machines that the tests of a module share, as `vm_factory` does. They end with the module."""
    yield from _shared_factory(request, vm_defaults)


@pytest.fixture(scope="session")
def session_vm_factory(request: pytest.FixtureRequest, vm_defaults: dict[str, Any]) -> Iterator[MachineFactory]:
    """Function to start machines that all tests of a worker share, as `vm_factory` does. They end with the run."""
    yield from _shared_factory(request, vm_defaults)


def _shared_factory(request: pytest.FixtureRequest, defaults: dict[str, Any]) -> Iterator[MachineFactory]:
    from pytest_vmbottle.machine.lan import Lans

    # LANs of their own, which outlast the machines and all of their tests.
    with closing(Lans()) as lans, ExitStack() as stack:
        yield _factory(request, stack, defaults, lans)


def _factory(request: pytest.FixtureRequest, stack: ExitStack, defaults: dict[str, Any], lans: Lans) -> MachineFactory:
    # For a machine that several tests share no test is given: it must not depend on which of them came first.
    item = request.node if request.scope == "function" else None

    def make(source: Source | MachineSpec | Snapshot | HasSnapshot, **keywords: Unpack[MachineKeywords]) -> Machine:
        from pytest_vmbottle.machine.snapshot import Snapshot
        from pytest_vmbottle.standalone.capsules import Capsule

        # A snapshot has its own boot source, and no pack is looked for.
        if isinstance(source, Snapshot):
            return _enter(request, stack, source.of(**keywords), lans, (source.start, None))
        if isinstance(source, Capsule):
            return _enter_capsule(request, stack, source, keywords, lans)
        if isinstance(source, MachineSpec):
            spec = source.but(**keywords)
        else:
            spec = resolve(request.config, {"source": source, **keywords}, defaults, item)
        if item is None and spec.reset != "none":
            name = request.fixturename
            raise SpecError(f"reset={spec.reset!r}: is for class_vm, module_vm, session_vm; a machine of {name} is reset by its restore()")
        return _enter(request, stack, spec, lans)

    return make


@pytest.fixture
def crash_explorer(request: pytest.FixtureRequest) -> Iterator[Callable[[Machine, str], AbstractContextManager[CrashLog]]]:
    """Context manager `crash_explorer(vm, disk)` that records a disk's writes, and gives the states that a crash could leave it in."""
    from pytest_vmbottle.machine.crash_explorer import record_crashes

    @contextmanager
    def make(spec: MachineSpec, start: Start) -> Iterator[Machine]:
        with ExitStack() as own:
            yield _enter(request, own, spec, None, (start, None))

    with ExitStack() as stack:

        @contextmanager
        def explore(vm: Machine, disk: str) -> Iterator[CrashLog]:
            with record_crashes(vm, disk, make) as log:
                stack.callback(log.close)
                yield log

        yield explore


@pytest.fixture
def vm_benchmark(request: pytest.FixtureRequest) -> Benchmark:
    """Function `vm_benchmark(vm, command, limit=0.3)` that fails if a command takes more instructions (percent) than its baseline."""
    from pytest_vmbottle.plugin.baselines import Baselines, Benchmark

    session = request.config.stash[SESSION]

    def emulator_of(vm: Machine) -> str:
        return f"{session.provisioner(vm.spec.backend).capabilities.version}, {vm.spec.arch}"

    baselines = Baselines(session.baselines_file, renew=session.options.new_baselines)
    return Benchmark(baselines=baselines, test=request.node.nodeid, emulator_of=emulator_of, say=session.say)


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


def _shared(request: pytest.FixtureRequest, defaults: dict[str, Any]) -> Iterator[Machine]:
    # The parameter, which is also what keeps a session machine apart from others: pytest makes the fixture anew for each value.
    plan: Plan = getattr(request, "param", None) or _plan_of_class(request)
    with ExitStack() as stack:
        # No item is given: a machine that several tests share must not depend on which of them came first.
        yield _enter(request, stack, resolve(request.config, plan.wishes[plan.primary], defaults, None))


def _plan_of_class(request: pytest.FixtureRequest) -> Plan:
    """Return the plan of a class whose tests have no parameters, those of unittest.

    Raises:
        SpecError: The test has no plan, because pytest did not know at collection that it would ask for the fixture.
    """
    test, name = request.config.stash[SESSION].test, request.fixturename
    if test is None or name not in getattr(test, "fixturenames", ()):
        raise SpecError(
            f"{name} is requested while the test runs, when the marks of this test are no longer known: make it an argument of the test or "
            f"of its fixture, or write @pytest.mark.usefixtures({name!r})"
        )
    return plans_of(request.node)[0]


@pytest.fixture
def vm_kernel_tests(request: pytest.FixtureRequest) -> KernelTests:
    """Function that reports the kernel's own tests (kselftest, KUnit) as subtests: it takes what they printed, in KTAP."""
    from pytest_vmbottle.plugin.kernel_tests import KernelTests

    try:
        return KernelTests(request.getfixturevalue("subtests"))  # of pytest 9, or of pytest-subtests
    except pytest.FixtureLookupError:
        return KernelTests(None)


@pytest.fixture
def _vm_reset(request: pytest.FixtureRequest) -> None:
    # By `getfixturevalue`, since a fixture cannot ask for fixtures that its test does not have.
    for name in SHARED:
        if name in request.fixturenames:
            _check_kept(request, parameter(request.node, name), name)
            request.config.stash[SESSION].reset(request.getfixturevalue(name))


def _check_kept(request: pytest.FixtureRequest, plan: object, name: str) -> None:
    if isinstance(plan, Plan) and plan != plan_of(request.node):
        raise SpecError(f"a vm mark was added to the test after its {name} was made: add it during collection")


def _enter(
    request: pytest.FixtureRequest,
    stack: ExitStack,
    spec: MachineSpec,
    lans: Lans | None = None,
    saved: tuple[Start, Origin | None] | None = None,
) -> Machine:
    session = request.config.stash[SESSION]
    start, origin = saved or (None, None)
    try:
        with _counting_retries(request, session.provisioner(spec.backend)) as provisioner:
            return stack.enter_context(provisioner.machine(spec, start=start, origin=origin, lans=lans))
    except BackendUnavailable as error:
        if not session.options.skips_missing:
            raise
        pytest.skip(f"no machine can be run here: {error}")
    # A layer's misspelt name is taken for that of an image.
    except ImageMissing as error:
        near = near_layers(session.test, error.name) if session.test is not None else []
        if not near:
            raise
        raise SpecError(f"there is no image and no layer {error.name!r}: did you mean the layer {' or '.join(map(repr, near))}?") from None


def _enter_capsule(request: pytest.FixtureRequest, stack: ExitStack, capsule: Capsule, keywords: Mapping[str, Any], lans: Lans) -> Machine:
    stored = capsule.stored()
    spec = stored.snapshot().of(**keywords)
    capsule.check_fits(request.config.stash[SESSION].provisioner(spec.backend).fingerprint(spec))
    return _enter(request, stack, spec, lans, (stored.start, stored.origin))


@contextmanager
def _counting_retries(request: pytest.FixtureRequest, provisioner: Provisioner) -> Iterator[Provisioner]:
    """Record with a test how many extra machines were started for it."""
    before = provisioner.tally.retried
    try:
        yield provisioner
    finally:
        properties = getattr(request.node, "user_properties", None)  # a class, a module and a session have none
        if properties is not None and provisioner.tally.retried > before:
            properties.append((RETRIES, str(provisioner.tally.retried - before)))
