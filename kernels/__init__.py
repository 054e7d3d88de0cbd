"""Triton kernels for GPUs. None is shipped yet: on a GPU the package runs its plain PyTorch backend."""
