"""The operator as Triton kernels. Nothing here is imported before the kernels are asked for."""
