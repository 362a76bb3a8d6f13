"""Every setting of a layer has an effect: none is accepted and then ignored."""

import dataclasses

import pytest
import torch

from kernels import backend_choice

SECTIONS = ("mlstm", "preup_mlstm", "slstm")


@pytest.mark.parametrize(
    ("name", "section", "key", "value"),
    [
        ("mlstm", None, "norm_eps", 1e-2),
        ("mlstm", None, "logit_soft_cap", 2.0),
        ("mlstm", "mlstm", "gate_soft_cap", 2.0),
        ("mlstm", "mlstm", "head_norm_eps", 1e-2),
        ("mlstm", "mlstm", "cell_eps", 10.0),
        ("mlstm_sigmoid", "mlstm", "normaliser", False),
        ("slstm", "slstm", "gate_soft_cap", 2.0),
        ("slstm", "slstm", "head_norm_eps", 1e-2),
        ("attention", "attention", "rope_theta", 100.0),
        ("neurips_mlstm", None, "norm_eps", 1e-2),
        ("neurips_mlstm", "preup_mlstm", "head_norm_eps", 1e-2),
        ("neurips_mlstm", "preup_mlstm", "cell_eps", 10.0),
    ],
)
def test_a_setting_changes_what_the_model_computes(small_configs, make_model, make_batch, name, section, key, value):
    config, batch = small_configs[name], make_batch()
    before = make_model(config)(**batch).token_losses
    # Behind a scale-invariant norm eps of the cell has an effect through the norm's own eps alone: float64 shows it.
    assert torch.equal(make_model(config)(**batch).token_losses, before)
    if section is None:
        changed = dataclasses.replace(config, **{key: value})
    else:
        layer = dataclasses.replace(getattr(config, section), **{key: value})
        changed = dataclasses.replace(config, **{section: layer})
    assert (make_model(changed)(**batch).token_losses - before).abs().max() > 1e-8


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("mlstm_and_slstm", {"mLSTM", "mLSTM step", "sLSTM", "head norm"}),
        ("neurips_mlstm_and_slstm", {"mLSTM", "mLSTM step", "sLSTM", "head norm"}),
    ],
)
def test_the_backend_reaches_every_operation(monkeypatch, small_configs, make_model, make_batch, name, operations):
    config, tokens = small_configs[name], make_batch()["tokens"]
    sections = {key: getattr(config, key) for key in SECTIONS if getattr(config, key) is not None}
    layers = {key: dataclasses.replace(section, backend="reference") for key, section in sections.items()}
    model = make_model(dataclasses.replace(config, **layers))
    choose, seen = backend_choice.choose, []

    def note(operation, backend, *rest):
        seen.append((operation, backend))
        return choose(operation, backend, *rest)

    monkeypatch.setattr(backend_choice, "choose", note)
    with torch.no_grad():
        state = model(tokens[:, :-1], return_state=True).state
        model(tokens[:, -1:], state=state.for_decoding())
    assert set(seen) == {(operation, "reference") for operation in operations}
