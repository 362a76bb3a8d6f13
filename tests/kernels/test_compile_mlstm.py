"""The mLSTM's kernels compile for Hopper: on tensor cores, within its registers, with the tiles of the tuned table."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from kernels.integers import ceil_div  # noqa: E402
from kernels.mlstm.chunkwise import op, problem  # noqa: E402
from kernels.mlstm.chunkwise.tiles import SIXTEEN_BIT, TABLES, fit, tuned  # noqa: E402
from kernels.mlstm.inputs import CellSettings, cell_inputs  # noqa: E402
from tests.kernels.compile_gate import assert_lean, compile_launches  # noqa: E402

PRODUCTS = {
    "states_kernel",
    "scores_kernel",
    "read_out_kernel",
    "score_gradients_kernel",
    "token_gradients_kernel",
}
# Bytes of a thread, none of them in a loop of products: two tiles of 128 x 128 float32 and the decays between them fill
# the registers of 8 warps, one such tile and the rows it is weighted with those of 4.
SPILLS = {"score_gradients_kernel": 128, "token_gradients_kernel": 512}


def launch_both_passes(key_dim, value_dim, device=None, few_sequences=False, starts=False):
    """Every launch of a forward and a backward pass, on empty tensors, with the tiles tuned for `device`, if any."""
    batch, length, heads = 1, 300, 2
    q = torch.empty(batch, length, heads, key_dim, dtype=torch.bfloat16)
    v = torch.empty(batch, length, heads, value_dim, dtype=torch.bfloat16)
    gate = torch.empty(batch, length, heads)
    start = torch.zeros(batch, length, dtype=torch.bool) if starts else None
    cut = SIXTEEN_BIT if device is None else tuned(device)[key_dim, value_dim, few_sequences]
    problem.choose_tiles = lambda *_: fit(cut, key_dim, value_dim)
    inputs, settings = cell_inputs(q, v, gate, gate, start), CellSettings()
    results = op.mlstm_chunkwise.function(q, inputs, settings, False, False)
    kept = op.Kept(results.packed, results.chunk_decay, results.query_normaliser, None, None)
    op.mlstm_chunkwise_backward.function(v, op.Ends(None, None), q, inputs, results.h, kept, settings)


@pytest.mark.slow
@pytest.mark.long
def test_kernels_are_lean():
    calls = [
        (launch_both_passes, {"key_dim": 256, "value_dim": 512, "device": "NVIDIA H200", "starts": True}),
        (launch_both_passes, {"key_dim": 96, "value_dim": 192}),
    ]
    for path in TABLES.glob("*.json"):
        device = path.stem
        for key_dim, value_dim, few_sequences in tuned(device):
            shape = {"key_dim": key_dim, "value_dim": value_dim, "few_sequences": few_sequences}
            calls.append((launch_both_passes, {**shape, "device": device}))
    for kernels in compile_launches(calls):
        assert {kernel.name for kernel in kernels} >= PRODUCTS
        for kernel in kernels:
            assert_lean(kernel, stack_bytes=SPILLS.get(kernel.name, 0), tensor_cores=kernel.name in PRODUCTS)
            if kernel.name in PRODUCTS:
                # None: a product of a single step has no loop.
                assert kernel.asynchronous_copies > 0 and kernel.spills_in_loop in (0, None), kernel


def test_every_tuned_table_is_readable():
    tables = sorted(TABLES.glob("*.json"))
    assert tables
    for path in tables:
        for (key_dim, value_dim, _), tiles in tuned(path.stem).items():
            assert fit(tiles, key_dim, value_dim) == tiles
            rows = [tile.rows for name, tile in vars(tiles).items() if name not in ("chunk", "states")]
            assert all(tiles.chunk % count == 0 for count in rows)
            assert ceil_div(tiles.chunk, tiles.states.tokens) * tiles.states.tokens == tiles.chunk


def test_few_sequences_are_summed_in_the_order_of_many():
    for path in TABLES.glob("*.json"):
        table = tuned(path.stem)
        for (key_dim, value_dim, few), tiles in table.items():
            other = table.get((key_dim, value_dim, not few), fit(SIXTEEN_BIT, key_dim, value_dim))
            for name in ("chunk", "scores", "score_gradients", "gradients"):
                assert getattr(tiles, name) == getattr(other, name), (path, key_dim, value_dim, name)
            for name in ("states", "read_out"):
                steps = [(tile.inner, tile.tokens) for tile in (getattr(tiles, name), getattr(other, name))]
                assert steps[0] == steps[1], (path, key_dim, value_dim, name)
