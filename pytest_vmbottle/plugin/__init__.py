"""The pytest plugin: options, the `vm` mark, fixtures and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_vmbottle.plugin import collection, fixtures, hookspec, options, reports, session
from pytest_vmbottle.plugin.collection import Sorting
from pytest_vmbottle.plugin.options import Options
from pytest_vmbottle.plugin.reports import Clock, InterruptedTest, LastWords, Outcomes
from pytest_vmbottle.plugin.session import SESSION, Interrupted, Session
from pytest_vmbottle.spec import SIGNATURE

if TYPE_CHECKING:
    import pytest

_PARTS = (options, session, collection, fixtures, reports)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the hooks of `hookspec` and the modules of the plugin.

    `pytest_plugins` is not used, because pytest would warn that it cannot rewrite the assertions of modules that are imported already.
    """
    pluginmanager.add_hookspecs(hookspec)
    for part in _PARTS:
        pluginmanager.register(part, part.__name__)


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark and check the options, without creating anything."""
    config.addinivalue_line("markers", f"{SIGNATURE}: run the test on a real machine made from an image or a layer.")
    # The options are checked here, so that a wrong one is a usage error before anything is collected.
    ours = config.stash[SESSION] = Session(config, Options.of(config))
    # Objects and not modules: hooks of the same name, with other places in pytest's order, cannot be in one module.
    config.pluginmanager.register(Sorting(), "vmbottle-sorting")
    config.pluginmanager.register(Interrupted(ours), "vmbottle-interrupted")
    config.pluginmanager.register(InterruptedTest(ours), "vmbottle-interrupted-test")
    if ours.options.shard is not None:
        # Imported here and not above: few runs are a part of several.
        from pytest_vmbottle.plugin.sharding import Sharding

        config.pluginmanager.register(Sharding(*ours.options.shard), "vmbottle-sharding")
    if ours.spares:
        from pytest_vmbottle.plugin.expecting import Expecting

        config.pluginmanager.register(Expecting(ours), "vmbottle-expecting")
    if ours.options.hosts and not hasattr(config, "workerinput") and not ours.only_asked:
        # Imported here and not above: most runs are on this host.
        from pytest_vmbottle.plugin.hosts import Hosts

        config.pluginmanager.register(Hosts(ours), "vmbottle-hosts")
    # Reports are shown and counted in one process: a worker of pytest-xdist only sends them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config), "vmbottle-outcomes")
        config.pluginmanager.register(LastWords(), "vmbottle-ledger")
        # A part of the suite changes nothing by which the other parts are told.
        if ours.options.shard is None:
            config.pluginmanager.register(Clock(config), "vmbottle-clock")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Restore the signal handlers of the process."""
    # pytest calls this also if `pytest_configure` failed, perhaps before there was a session.
    ours = config.stash.get(SESSION, None)
    if ours is not None:
        ours.interruption.restore()
