"""The Triton backend: mixtures on CUDA GPUs."""
