"""Machine specs: keywords and layers."""

from pytest_vmbottle.spec.spec import (
    BOOT,
    POWER_IN_FIRST_BOOT,
    PREPARATION,
    SIGNATURE,
    Content,
    File,
    Layer,
    MachineKeywords,
    MachineSpec,
    Source,
    check_keywords,
    ends_first_boot,
    is_mode,
    layer,
    mistakes,
    script_ends_first_boot,
)

__all__ = [
    "BOOT",
    "POWER_IN_FIRST_BOOT",
    "PREPARATION",
    "SIGNATURE",
    "Content",
    "File",
    "Layer",
    "MachineKeywords",
    "MachineSpec",
    "Source",
    "check_keywords",
    "ends_first_boot",
    "is_mode",
    "layer",
    "mistakes",
    "script_ends_first_boot",
]
