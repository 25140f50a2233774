"""Benches: each prints its figures with one command (see its first lines)."""
