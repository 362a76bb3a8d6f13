"""Optima of budgets against the closed form, costs of tokens, and FLOPs against published runs."""

from __future__ import annotations

import numpy as np
import pytest

from launch.scaling.flops import run_flops, six_n_d
from launch.scaling.predict import flops_for_loss, optimum
from launch.scaling.runs import ScalingRun
from launch.scaling.token_cost import TokenCost, fit_cost
from model import preset
from model.accounting import count_parameters
from tests.launch.recovery import WITH_GAMMA, Truth

SIX_N = TokenCost((6.0, 0.0, 0.0), 1e6, 0.0)


@pytest.mark.parametrize("truth", [Truth(), WITH_GAMMA], ids=["gamma-1", "gamma-free"])
def test_the_optimum_is_the_closed_form_where_a_token_costs_6n(truth: Truth) -> None:
    budgets = np.array([1e18, 1e20, 5.76e23])
    sizes, tokens, losses = optimum(truth.coefficients[None], SIX_N, budgets)
    assert sizes[0] == pytest.approx([truth.optimal_size(budget) for budget in budgets], rel=1e-3)
    assert tokens[0] == pytest.approx(budgets / (6 * sizes[0]))
    assert (np.diff(losses[0]) < 0).all()


def test_dear_tokens_of_large_models_make_the_optimum_smaller() -> None:
    budgets = np.array([1e20])
    dear = TokenCost((6.0, 6e3, 0.0), 1e6, 0.0)
    assert (
        optimum(Truth().coefficients[None], dear, budgets)[0] < optimum(Truth().coefficients[None], SIX_N, budgets)[0]
    )


def test_an_optimum_beyond_the_known_costs_is_no_number() -> None:
    known_from = TokenCost((6.0, 0.0, 0.0), 1e10, 0.0)
    assert np.isnan(optimum(Truth().coefficients[None], known_from, np.array([1e18]))[0]).all()


def test_flops_for_a_loss_are_read_off_the_curve() -> None:
    flops = np.geomspace(1e18, 1e22, 41)
    curves = optimum(Truth().coefficients[None], SIX_N, flops)[2]
    assert flops_for_loss(curves, flops, curves[:, 17]) == pytest.approx(flops[17])
    assert np.isnan(flops_for_loss(curves, flops, np.array([1.0])))


def test_the_cost_of_a_token_is_learned_from_runs() -> None:
    sizes = np.geomspace(1e8, 4e9, 12)
    costs = 6.2 * sizes + 300 * sizes ** (2 / 3)
    runs = [ScalingRun("r", "f", n, 1e9, c * 1e9, None, 3.0) for n, c in zip(sizes, costs, strict=True)]
    cost = fit_cost(runs)
    assert cost.flops(np.array([7e10])) == pytest.approx(6.2 * 7e10 + 300 * 7e10 ** (2 / 3), rel=1e-6)
    assert cost.error < 1e-9
    one_size = fit_cost(runs[:1] * 3)
    assert one_size.flops(np.array([2e8])) == pytest.approx(2 * costs[0])


# Runs of arXiv 2510.02228, from the data that its authors published (github.com/NX-AI/xlstm_scaling_laws, 604bb306):
# family, blocks, width, heads, feed-forward width, context, parameters, tokens, FLOPs.
PUBLISHED = [
    ("xlstm_160m", 12, 640, 5, 1728, 2048, 123963640, 10695475200, 6.002771390772019e18),
    ("xlstm_160m", 12, 896, 7, 2432, 8192, 207310376, 6291456000, 6.217910236348416e18),
    ("xlstm_160m", 14, 640, 5, 1728, 16384, 133892620, 9646899200, 6.006064115181158e18),
    ("llama_160m", 13, 640, 10, 1728, 2048, 128836480, 8808038400, 6.025716333910426e18),
    ("llama_160m", 13, 640, 10, 1728, 8192, 128836480, 6081740800, 6.062367195738931e18),
    ("llama_160m", 13, 640, 10, 1728, 16384, 128836480, 4194304000, 5.929681777852416e18),
]


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run[0][:5]}-{run[5]}")
def test_flops_and_parameters_are_those_of_published_runs(run) -> None:
    name, blocks, width, heads, ffn_dim, context, parameters, tokens, flops = run
    mixer = {"mlstm": {"n_heads": heads}} if "xlstm" in name else {"attention": {"n_heads": heads, "n_kv_heads": heads}}
    model = preset(name, n_blocks=blocks, d_model=width, ffn_dim=ffn_dim, **mixer)
    assert count_parameters(model).total == parameters
    assert run_flops(model, context, tokens) == pytest.approx(flops, rel=1e-9)


def test_six_n_d_is_what_chinchilla_was_counted_with() -> None:
    """arXiv 2203.15556: 70 billion parameters and 1.4 trillion tokens."""
    assert six_n_d(70e9, 1.4e12) == pytest.approx(5.88e23)
