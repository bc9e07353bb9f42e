"""The operator as Triton kernels. Nothing here is imported until the kernels are requested."""
