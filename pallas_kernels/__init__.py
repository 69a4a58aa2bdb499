"""Kernels for GPU and TPU that read sdq's formats directly. Knows sdq, never models."""
