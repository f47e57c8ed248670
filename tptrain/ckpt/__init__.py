"""Checkpoints: Orbax on disk, flat dicts of Hugging Face names, readable by JAX without this package."""
