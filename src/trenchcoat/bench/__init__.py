"""Measurements on this machine: one class in one file each, and one line in :mod:`trenchcoat.bench.registry`."""
