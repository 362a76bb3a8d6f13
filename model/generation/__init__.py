"""Text from a trained model."""

from model.generation.session import generate

__all__ = ["generate"]
