"""Benchmarks of this machine: each is one class in one file, and one line in :mod:`trenchcoat.bench.registry`."""
