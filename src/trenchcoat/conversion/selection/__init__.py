"""Choosing the key/value groups that keep softmax attention, by measurement."""
