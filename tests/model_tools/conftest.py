"""A run as the commands of model find it."""

from pathlib import Path

import pytest

from data_pipeline.tokenizing.config import TokenizerConfig
from data_pipeline.tokenizing.tokenizer import train_sentencepiece
from model.weights import save_model
from tests.marking import mark_checkpoint
from tests.model_tools.small_models import TEXT_CONFIG, random_model


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run with two complete checkpoints and a newer one that was torn."""
    run = tmp_path_factory.mktemp("runs") / "first"
    for seed, step in enumerate((10, 20, 30)):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        save_model(random_model(TEXT_CONFIG, seed), TEXT_CONFIG, checkpoint / "weights")
        if step < 30:
            mark_checkpoint(checkpoint)
    model = train_sentencepiece(
        [Path(__file__).with_name("test_command_line.py").read_text()], TokenizerConfig(vocab_size=370)
    )
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.model").write_bytes(model)
    return run
