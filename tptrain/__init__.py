"""tptrain: fine-tune Hugging Face language models on TPU slices with PyTorch."""

__version__ = "0.1.0"
