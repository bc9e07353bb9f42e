"""Checkpoints of the original LoLCATs code: their files, their settings, and the way to an adapter and back."""
