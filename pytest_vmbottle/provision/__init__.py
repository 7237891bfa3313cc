"""From a spec to a running machine: images, packs, instances, and who closes what.

Here the catalog and the backend meet; neither knows of the other.
"""

from __future__ import annotations

from pytest_vmbottle.provision.context import Settings, Tally
from pytest_vmbottle.provision.provisioner import Provisioner

__all__ = ["Provisioner", "Settings", "Tally"]
