"""Plans of packs: which ones a spec needs, and their keys.

Equal plans have equal keys, and so share a pack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle.catalog import packs
from pytest_vmbottle.host.digests import digest
from pytest_vmbottle.spec import BOOT, Layer, MachineSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_vmbottle.provision.origins import Origin
    from pytest_vmbottle.spec.pack_kind import PackKind

__all__ = ["Plan", "build_spec", "plan"]

_SEED_FORMAT = 3
"""Version of what our seed does to a guest; part of the key of every pack of an image."""


@attrs.frozen(kw_only=True)
class Plan:
    """Plan of one pack: its content and its key.

    Attributes:
        key: Its name in the catalog.
        kind: The kind of pack.
        spec: The machine that it is made with.
        origin: The image at the bottom.
        steps: The layers that are in it, the last one its own.
        parent: The pack that it stands on, if any.
    """

    key: str
    kind: PackKind
    spec: MachineSpec
    origin: Origin
    steps: tuple[Layer, ...]
    parent: Plan | None

    @property
    def name(self) -> str:
        """The pack's name for users."""
        return self.steps[-1].name if self.steps else self.origin.name


def plan(
    spec: MachineSpec, kind: PackKind, *, origin: Origin, fingerprint: str, skipped: Callable[[Path], object] = lambda _: None
) -> Plan:
    """Return the plan of the pack that machines of a spec are cloned from.

    Args:
        spec: The machine's spec.
        kind: The kind of pack.
        origin: The image at the bottom.
        fingerprint: Digest of everything that matters in the host and its backend.
        skipped: Function that gets dependencies of layers that cannot be read: see `Layer.recipe`.
    """
    # An image that was not made for us gets what it lacks, if its machines reach the network anyway; user-data may fetch something too.
    network = spec.nat and (not origin.prepared or spec.user_data is not None)
    # Only what a boot depends on: machines that differ in anything else share the image's pack.
    base = MachineSpec(source=spec.image, network=network, **_boots(spec))
    key = digest(packs.FORMAT, _SEED_FORMAT, kind, origin.key, base.network, spec.boot_digest(), fingerprint)
    made = Plan(key=key, kind=kind, spec=base, origin=origin, steps=(), parent=None)
    for step in spec.steps:
        build = build_spec(spec, step)
        # The parent's key is part of the child's, so a change in any layer below gives another key.
        key = digest(made.key, step.recipe(skipped=skipped), build.network, build.env, build.user)
        # A quick image has no pack of its own, so its first layer is built on the image itself.
        parent = made if made.steps or not origin.is_quick else None
        made = Plan(key=key, kind=kind, spec=build, origin=origin, steps=(*made.steps, step), parent=parent)
    return made


def build_spec(spec: MachineSpec, step: Layer) -> MachineSpec:
    """Return the spec of the machine to which a layer is applied.

    It boots like the final machine; everything else is the layer's own.
    """
    boots = _boots(spec)
    own = {key: value for key, value in step.keywords.items() if key not in {*boots, "packages", "files", "run", "fresh", "name"}}
    inherited = MachineSpec.resolve(step.source, {}) if isinstance(step.source, Layer) else MachineSpec(source=step.source)
    launch = {key: getattr(inherited, key) for key in ("network", "user")} | {"env": dict(inherited.env), "ports": inherited.ports}
    if step.keywords.get("packages"):
        launch["network"] = True  # where packages come from
    # The last one wins: a layer must not boot otherwise than the machines that are restored from it.
    keywords = {**launch, **own, **boots}
    keywords["disks"] = step.disks
    keywords["network"] = keywords["network"] is True  # a LAN is what a machine joins when it is cloned
    keywords["shares"] = {}  # as is a shared folder
    return MachineSpec(source=step.source, **keywords)


def _boots(spec: MachineSpec) -> dict[str, Any]:
    return {key: getattr(spec, key) for key in (*BOOT, "timeout")}
