"""Flax video diffusion transformers whose matmul is an argument. Knows sdq and pallas_kernels."""
