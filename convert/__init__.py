"""Across the PyTorch border: checkpoints in, safetensors out."""
