"""Disks as we write and read them ourselves: overlays, logs of writes, and what a crash leaves of these."""
