"""The operator in C++ for CPUs, compiled at its first use."""
