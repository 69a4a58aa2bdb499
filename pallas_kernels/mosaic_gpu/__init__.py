"""Kernels for Hopper GPUs, written in Mosaic GPU."""
