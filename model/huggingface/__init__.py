"""Hugging Face directories of xLSTM and Llama models: written for transformers, and read without it."""

from model.huggingface.base import HuggingFaceError
from model.huggingface.exporting import export_huggingface
from model.huggingface.formats import inexpressible
from model.huggingface.importing import import_huggingface

__all__ = ["HuggingFaceError", "export_huggingface", "import_huggingface", "inexpressible"]
