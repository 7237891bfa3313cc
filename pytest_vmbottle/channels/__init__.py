"""Channels: ways to run commands in a guest."""
