"""The operator in linear time, chunk by chunk, in PyTorch."""
