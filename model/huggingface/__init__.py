"""Hugging Face directories, of its xLSTM and Llama and of our own: written for transformers, and read without it."""

from model.huggingface.base import HuggingFaceError, OtherLogitsError
from model.huggingface.exporting import export_huggingface
from model.huggingface.formats import inexpressible
from model.huggingface.importing import HuggingFaceReader, import_huggingface

__all__ = [
    "HuggingFaceError",
    "HuggingFaceReader",
    "OtherLogitsError",
    "export_huggingface",
    "import_huggingface",
    "inexpressible",
]
