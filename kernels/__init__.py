"""Triton kernels: row statistics and row gradients of logits, alone and fused with the GEMM that makes them.

The host side, and the choice between them, is in ``tightrope.backends.triton``.
"""
