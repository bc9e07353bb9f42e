"""Measurements on this machine, one module each: ``trenchcoat bench NAME`` runs ``trenchcoat.bench.NAME.main``."""
