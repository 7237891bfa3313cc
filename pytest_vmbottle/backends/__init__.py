"""Hypervisors that make machines."""
