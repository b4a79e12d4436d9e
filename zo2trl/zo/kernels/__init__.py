"""Triton kernels: fast paths for CUDA devices, bit-equal to the generic arithmetic, chosen by identity."""
