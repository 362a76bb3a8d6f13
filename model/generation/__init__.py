"""Text from a trained model."""

from model.generation.session import generate, sampling_problems

__all__ = ["generate", "sampling_problems"]
