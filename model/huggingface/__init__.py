"""Hugging Face directories of xLSTM models: written for transformers, and read without it."""

from model.huggingface.exporting import export_huggingface, inexpressible
from model.huggingface.importing import HuggingFaceReader, import_huggingface
from model.huggingface.names import HuggingFaceError

__all__ = ["HuggingFaceError", "HuggingFaceReader", "export_huggingface", "import_huggingface", "inexpressible"]
