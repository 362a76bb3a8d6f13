"""Hybrids and rivals by the real command line: trained with carried states, interrupted, resumed, generated from."""

import json
import subprocess
import sys

import pytest

from tests.runs import PATIENCE, ROOT, TINY_RUN, environment, run_train

# Of the tiny run, what is not of its sLSTM and mLSTM blocks.
SHARED = [setting for setting in TINY_RUN if not setting.startswith(("model.slstm", "model.mlstm", "checkpoint."))]
OF_MLSTM = ["model.slstm_at=[]", "model.slstm=null", "model.mlstm.n_heads=2", "model.mlstm.reference_chunk_size=16"]
ALONE = ["model.slstm_at=[]", "model.slstm=null", "model.mlstm=null"]
WINDOW = "{n_heads: 2, n_kv_heads: 1, window: 20, sinks: true}"
MODELS = {
    "window": [*OF_MLSTM, "model.attention_at=[1]", f"+model.attention={WINDOW}"],
    "beside": [
        *ALONE,
        "model.block=mlstm_attention",
        "+model.layers.mlstm_attention.mlstm.n_heads=2",
        f"+model.layers.mlstm_attention.attention={WINDOW}",
    ],
    "gla": [*ALONE, "model.block=gla", "+model.layers.gla.n_heads=2"],
    "retnet": [*ALONE, "model.block=retnet", "+model.layers.retnet.n_heads=2"],
    "mamba2": [*ALONE, "model.block=mamba2", "+model.layers.mamba2.head_dim=16", "model.ffn_dim=null"],
    "gated_deltanet": [*ALONE, "model.block=gated_deltanet", "+model.layers.gated_deltanet.n_heads=2"],
}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_run_carries_its_state_over_an_interruption(name, small_corpus, tmp_path):
    """Rows go on from step to step and from an attempt to the next, with the losses of a run in one go."""
    settings = [
        f"corpus.directory={small_corpus}",
        f"run_root={tmp_path}",
        *[setting for setting in SHARED if not (name == "mamba2" and setting.startswith("model.ffn_dim"))],
        *MODELS[name],
        "training.carry_state=true",
        "training.carry_windows=8",
        "training.time_chunk=16",
        "checkpoint.interval=3",
        # A rate that does not depend on where the run ends.
        "schedule=constant",
        "schedule.warmup=0",
    ]
    whole = run_train(["name=whole", *settings, "training.total_steps=6"])
    assert whole.returncode == 0, whole.stderr
    first = run_train(["name=parts", *settings, "training.total_steps=3"])
    assert first.returncode == 0, first.stderr
    second = run_train(["name=parts", *settings, "training.total_steps=6"])
    assert second.returncode == 0, second.stderr
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "parts") == pytest.approx(expected, rel=1e-6) and expected[6] < expected[1]
    line = [
        sys.executable,
        "-m",
        "model",
        "generate",
        f"checkpoint={tmp_path / 'whole'}",
        "prompt=a",
        "max_new_tokens=40",
    ]
    done = subprocess.run(line, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr
