"""Attention transfer one block of layers at a time, for models larger than the machine."""
