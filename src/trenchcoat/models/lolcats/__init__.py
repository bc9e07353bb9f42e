"""Checkpoints of the original LoLCATs code: their files, their settings, and conversion from and to adapters."""
