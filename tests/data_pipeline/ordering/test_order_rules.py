"""What is wrong with the settings of an order, before any corpus is opened."""

from __future__ import annotations

import pytest

from data_pipeline.ordering.config import PACKINGS, MixturePhaseConfig, OrderConfig, validate_order


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_defaults_are_fine_with_every_packing(packing):
    assert validate_order(OrderConfig(packing=packing)) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"weights": {"web": -1.0, "code": 2.0}}, ["run.weights.web: a share cannot be negative (-1.0)"]),
        (
            {"weights": {"web": 0.0}},
            ["run.weights: at least one share must be positive; set it to null to use sources as they are"],
        ),
        (
            {"phases": [MixturePhaseConfig(from_step=3), MixturePhaseConfig(from_step=4, from_sample=5)]},
            ["run.phases[1]: set exactly one of from_step (4) and from_sample (5), the other to null"],
        ),
        ({"packing": "tight"}, ["run.packing: no such choice ('tight'); choose one of concatenate, best_fit"]),
        (
            {"packing_directory": "plans"},
            ["run.packing_directory: only packing=best_fit keeps a plan ('plans'); set it to null"],
        ),
        (
            {"window_shards": 0, "packing": "best_fit"},
            [
                "run.window_shards: packing=best_fit takes its samples from blocks of documents, not from shards (0); "
                "set it to null, or run.packing to concatenate",
                "run.window_shards: must be at least 1 (0)",
            ],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_rule_names_key_value_and_remedy(changes, lines):
    assert validate_order(OrderConfig(**changes), "run") == lines
