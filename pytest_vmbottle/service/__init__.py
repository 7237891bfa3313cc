"""Machines over HTTP: the service behind `vmbottle serve`."""
