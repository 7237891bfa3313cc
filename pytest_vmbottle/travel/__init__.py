"""Packs that travel from one computer to another."""
