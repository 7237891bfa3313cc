from __future__ import annotations

import pytest

from examples.foreign.sources import Sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Source packages of Debian 12."""
    return Sources(tmp_path_factory.mktemp("apt"))
