"""Conversions between checkpoints and Hugging Face folders, and looking at and comparing both."""

from tptrain.errors import TptrainError

# What is verified after a conversion: weights and logits, or the weights alone.
VERIFY_LEVELS = ("all", "digests")


class VerificationError(TptrainError):
    """What was written is not what it was made from."""
