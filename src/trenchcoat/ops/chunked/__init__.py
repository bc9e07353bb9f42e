"""The operator in linear time, chunk after chunk, in PyTorch."""
