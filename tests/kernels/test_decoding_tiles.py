"""How products of a decoding step are cut: for every shape within what a program may hold."""

import pytest

from kernels.decoding import MAX_ROWS, tiles
from kernels.integers import next_power_of_two


@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("inputs", [64, 768, 4096, 10944])
@pytest.mark.parametrize("outputs", [64, 4096, 12288, 50304])
def test_pieces_on_their_way_fit_into_shared_memory(outputs, inputs, weights):
    for rows in range(2, MAX_ROWS + 1):
        tile = tiles.choose(rows, outputs, inputs, weights)
        elements = (weights * tile.block_n + max(16, next_power_of_two(rows))) * tile.block_k
        assert 2 * elements * tile.num_stages <= tiles.MOST_SHARED_BYTES, (rows, tile)


@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64])
def test_a_tile_is_no_wider_than_what_it_reads(rows, weights):
    for inputs in (16, 100, 4096, 10944):
        tile = tiles.choose(rows, 4096, inputs, weights)
        assert tile.block_k <= next_power_of_two(inputs)
        assert all(size & (size - 1) == 0 for size in tile[:3]), tile
