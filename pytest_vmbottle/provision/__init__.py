"""From specs to running machines: images, packs and instances.

This room joins the catalog and the backend, which do not know each other.
"""

from __future__ import annotations

from pytest_vmbottle.provision.context import Settings, Tally
from pytest_vmbottle.provision.provisioner import Provisioner

__all__ = ["Provisioner", "Settings", "Tally"]
