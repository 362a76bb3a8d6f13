"""Text from a trained model."""

from model.generation.batch import ContinuousBatch, Token
from model.generation.generating import generate
from model.generation.prefill import Prefix, read
from model.generation.sampling import SamplingSettings
from model.generation.session import Session

__all__ = ["ContinuousBatch", "Prefix", "SamplingSettings", "Session", "Token", "generate", "read"]
