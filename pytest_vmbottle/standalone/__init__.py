"""Machines without pytest."""
