"""The Wan 2.1/2.2 video diffusion transformers."""
