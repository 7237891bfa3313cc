"""Timelines: what happened to a machine, as events on one clock."""

from pytest_vmbottle.timeline.timeline import FORMAT, Span, Timeline, now, recorded, since_epoch, without_secrets

__all__ = ["FORMAT", "Span", "Timeline", "now", "recorded", "since_epoch", "without_secrets"]
