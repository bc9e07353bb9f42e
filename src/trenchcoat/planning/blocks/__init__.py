"""Attention transfer block by block, planned: the size of a block, the length of a pass, the ways to run it."""
