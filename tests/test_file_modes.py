"""Who may read what a command writes: the umask decides, for every file but one alike."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.__main__ import main as data_command
from model.__main__ import main as model_command
from model.weights import save_tensors
from tests.runs import TINY_RUN
from tests.train.plain_runs import run_plainly
from train.report import main as report


@pytest.fixture(params=[0o022, 0o027, 0o002], ids="{:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_of_a_corpus_a_run_a_checkpoint_and_an_export_follows_the_umask(tmp_path: Path, umask: int) -> None:
    corpus, runs = tmp_path / "corpus", tmp_path / "runs"
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"The order of {number} things is not what it seems. " * 40)
    settings = ["data=text", f"data.path={texts}", "tokenizer.vocab_size=300", "data.split.validation_fraction=0.2"]
    assert data_command(["prepare", *settings, f"output={corpus}"]) == 0
    assert data_command(["split", str(corpus), "--output", str(tmp_path / "part"), "--link", "copy"]) == 0
    # What transformers' xLSTM can express.
    model = ["model.slstm_at=[]", "model.slstm=null", "model.d_model=128"]
    settings = [*(setting for setting in TINY_RUN if "slstm" not in setting), *model, "training.total_steps=2"]
    run = [*settings, f"corpus.directory={corpus}", f"run_root={runs}", "name=first"]
    assert run_plainly([*run, "corpus.packing=best_fit"]) == 0
    assert report([str(runs / "first")]) == 0
    first = f"checkpoint={runs / 'first'}"
    assert model_command(["export", first, f"output={tmp_path / 'exported'}", "verify=false"]) == 0
    assert model_command(["import", f"source={tmp_path / 'exported'}", f"output={tmp_path / 'imported'}"]) == 0

    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    for suffix in ("weights-00000.safetensors", "model.safetensors", "manifest.json", "report.png", "tokenizer.model"):
        assert any(path.name == suffix for path in written), suffix
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
    # What it says of uncommitted changes may hold anything.
    (private,) = [path for path in written if path.name == "code.json"]
    assert modes.pop(private) == 0o600
    wanted = {True: 0o777 & ~umask, False: 0o666 & ~umask}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode != wanted[path.is_dir()]} == {}


def test_weights_written_over_a_file_keep_its_access_rights(tmp_path: Path) -> None:
    path = tmp_path / "weights-00000.safetensors"
    path.touch()
    path.chmod(0o640)
    save_tensors(path, {"a": torch.zeros(2)}, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
