"""Which packs a spec comes to, one on the other, and what each goes by: who plans the same gets the same pack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from pytest_vmbottle import packs
from pytest_vmbottle.spec import BOOT, Layer, MachineSpec, digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_vmbottle.backend import PackKind
    from pytest_vmbottle.images import Image

__all__ = ["Plan", "build_spec", "plan"]

_SEED_FORMAT = 3
"""Part of the key of every pack of an image: what our seed does to a guest."""


@attrs.frozen(kw_only=True)
class Plan:
    """One pack to be: what it is made of, and what it goes by.

    Attributes:
        key: Its name in the catalog.
        kind: What is to be in it.
        spec: The machine that it is made with.
        image: What is beneath all.
        steps: The layers that are in it, the last one its own.
        parent: The pack that it stands on, if any.
    """

    key: str
    kind: PackKind
    spec: MachineSpec
    image: Image
    steps: tuple[Layer, ...]
    parent: Plan | None

    @property
    def name(self) -> str:
        """What users call it."""
        return self.steps[-1].name if self.steps else self.image.name


def plan(spec: MachineSpec, kind: PackKind, *, image: Image, fingerprint: str, skipped: Callable[[Path], object] = lambda _: None) -> Plan:
    """The pack that machines of a spec are poured from.

    Args:
        spec: What is wanted.
        kind: What is to be in the pack.
        image: What is beneath all.
        fingerprint: Of all in the host and its backend that makes a difference.
        skipped: Told of what layers depend on and what cannot be read: see `Layer.recipe`.
    """
    # An image that was not made for us gets what it lacks, if its machines reach the network anyway; user-data may fetch something too.
    network = spec.nat and (not image.prepared or spec.user_data is not None)
    base = MachineSpec(source=spec.image, network=network, **_boots(spec))
    key = digest(packs.FORMAT, _SEED_FORMAT, kind, image.key, base.network, spec.boot_digest(), fingerprint)
    made = Plan(key=key, kind=kind, spec=base, image=image, steps=(), parent=None)
    for step in spec.steps:
        build = build_spec(spec, step)
        key = digest(made.key, step.recipe(skipped=skipped), build.network, build.env, build.user)
        parent = made if made.steps or not image.quick else None
        made = Plan(key=key, kind=kind, spec=build, image=image, steps=(*made.steps, step), parent=parent)
    return made


def build_spec(spec: MachineSpec, step: Layer) -> MachineSpec:
    """What the machine is that a step is done on: it boots with what the final one does, and all else is the step's own."""
    boots = _boots(spec)
    own = {key: value for key, value in step.keywords.items() if key not in {*boots, "packages", "files", "run", "fresh", "name"}}
    inherited = MachineSpec.resolve(step.source, {}) if isinstance(step.source, Layer) else MachineSpec(source=step.source)
    launch = {key: getattr(inherited, key) for key in ("network", "user")} | {"env": dict(inherited.env), "ports": inherited.ports}
    if step.keywords.get("packages"):
        launch["network"] = True  # where packages come from
    keywords = {**launch, **own, **boots}
    keywords["network"] = keywords["network"] is True  # a LAN is what a machine joins when it is poured
    return MachineSpec(source=step.source, **keywords)


def _boots(spec: MachineSpec) -> dict[str, Any]:
    return {key: getattr(spec, key) for key in (*BOOT, "timeout")}
