"""A GPU whose every operation takes a time that is known, and the calibration that one would measure of it."""

from model.accounting import count_parameters
from model.compilation import CAPTURED, COMPILED, WRITTEN
from model.hardware import Hardware
from model.layers import layer_kinds
from model.presets import preset
from train.estimate.blocks import GRADIENT_BYTES, REDUCED_BYTES, block_works, head_products, logits_moved
from train.estimate.calibration import Calibration, CellPoint, ProductPoint, StepPoint
from train.estimate.rates import Rates

COPY = 4e12
PRODUCTS = 5e14
# What the calibration must find again.
ELEMENTWISE = {WRITTEN: 4.5, COMPILED: 3.0, CAPTURED: 3.0}
FORWARD_SHARE = 0.4
LOGITS = 2.5
HOST = {WRITTEN: (6e-3, 8e-3), COMPILED: (4e-3, 8e-3), CAPTURED: (1e-3, 5e-3)}
UPDATE = (0.005, 2e-5, 50.0)
UNALIGNED = 4.0
# Of a step's two passes each has half of what is copied once.
GRADIENTS = GRADIENT_BYTES + REDUCED_BYTES / 2


def products():
    return [
        ProductPoint(tokens, width, 6.0 * tokens * width**2 / PRODUCTS)
        for tokens in (2048, 8192, 32768)
        for width in (512, 2048, 8192)
    ]


def cells():
    return [
        CellPoint("mlstm", 4, 256, 512, 4, 4096, 0.4e-3, 1.4e-3),
        CellPoint("slstm", 4, 256, 256, 64, 2048, 4e-3, 10e-3),
        CellPoint("attention", 16, 128, 128, 4, 4096, 1e-3, 4e-3),
    ]


def bare():
    """Operations alone."""
    return Calibration("NVIDIA H200", 150 * 10**9, {"date": "2026-01-01", "torch": "2.11"}, COPY, products(), cells())


def steps():
    """Those that `python -m launch calibrate` takes of such a GPU, as its docstrings say that they add up."""
    rates = Rates(bare())
    found = []
    for model, depths, shapes in (
        ("xlstm_1b4", (2, 6), [(4, 4096, COMPILED, "none")]),
        ("xlstm_1b4", (6,), [(4, 4096, WRITTEN, "none"), (4, 4096, COMPILED, "unit"), (4, 4096, COMPILED, "block")]),
        ("xlstm_400m", (2, 8), [(1, 512, COMPILED, "none"), (8, 2048, CAPTURED, "none"), (1, 512, CAPTURED, "none")]),
        ("xlstm_400m", (8,), [(1, 512, WRITTEN, "none")]),
        ("neurips_1b3_1_0", (2, 6), [(4, 2048, COMPILED, "none")]),
    ):
        for n_blocks in depths:
            config = preset(model, n_blocks=n_blocks)
            for batch, length, execution, mode in shapes:
                seconds = max(
                    _gpu_seconds(config, batch, length, execution, mode, rates),
                    n_blocks * HOST[execution][0] + HOST[execution][1],
                )
                found.append(
                    StepPoint(
                        model, n_blocks, batch, length, execution, mode, seconds, _update_seconds(config), None, None
                    )
                )
    return found


def _gpu_seconds(config, batch, length, execution, mode, rates):
    (work,) = block_works(config, batch, length, Hardware("NVIDIA H200"), rates).values()
    elementwise = ELEMENTWISE[execution] * work.moved
    block = 3 * work.products + work.cell_both + elementwise + GRADIENTS * work.parameters / COPY
    if mode != "none":
        block += work.products + work.cell_forward + FORWARD_SHARE * elementwise
    tokens = batch * length
    rest = head_products(config, tokens, rates) * (1 if config.vocab_size % 8 == 0 else UNALIGNED)
    rest += LOGITS * logits_moved(config, tokens, rates) + GRADIENTS * 2 * config.vocab_size * config.d_model / COPY
    return len(layer_kinds(config)) * block + rest


def _update_seconds(config):
    counted, (once, tensor, moved) = count_parameters(config), UPDATE
    return once + tensor * counted.tensors + moved * counted.total / COPY
