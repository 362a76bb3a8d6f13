"""Digests of tensors and what follows from those of several ranks, without processes."""

import pytest
import torch

from train.parallel.replicas import _judge, digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (1024,), (3, 1024), (129, 65)])
def test_every_bit_shows_in_the_digest(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = int(digest(tensor))
    assert before == int(digest(tensor.clone()))
    words = tensor.view(-1).view(torch.int16 if dtype is torch.bfloat16 else torch.int32)
    bits = 8 * tensor.element_size()
    for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
        for bit in range(bits):
            # The sign bit as torch writes it.
            mask = torch.tensor(1).bitwise_left_shift(bit).to(words.dtype)
            words[place] ^= mask
            assert int(digest(tensor)) != before, (place, bit)
            words[place] ^= mask
    assert int(digest(tensor)) == before


def test_numbers_that_change_places_show_in_the_digest():
    tensor = torch.arange(5000.0)
    swapped = tensor.clone()
    swapped[[17, 4000]] = tensor[[4000, 17]]
    assert int(digest(tensor)) != int(digest(swapped))


def test_bits_that_are_no_number_have_a_digest():
    tensor = torch.full((10,), float("nan"))
    before = int(digest(tensor))
    tensor.view(torch.int32)[3] ^= 1
    assert tensor.isnan().all() and int(digest(tensor)) != before


HELD, FINE, WRONG = 1, 0, 1


@pytest.mark.parametrize(
    ("of_ranks", "wrong", "unclear"),
    [
        ([(5, HELD, FINE)] * 4, [], []),
        # The one that differs from all others.
        ([(5, HELD, FINE), (6, HELD, FINE), (5, HELD, FINE)], [1], []),
        ([(4, HELD, FINE), (6, HELD, FINE), (5, HELD, FINE), (5, HELD, FINE)], [0, 1], []),
        # As many say one thing as another.
        ([(5, HELD, FINE), (6, HELD, FINE)], [], [0, 1]),
        # One knows that it is wrong itself, and the others agree.
        ([(5, HELD, WRONG), (6, HELD, FINE)], [0], []),
        ([(5, HELD, WRONG), (6, HELD, FINE), (7, HELD, FINE)], [0], [1, 2]),
        # What a rank does not hold says nothing.
        ([(5, HELD, FINE), (0, 0, FINE), (5, HELD, FINE)], [], []),
        ([(0, 0, FINE), (0, 0, WRONG)], [1], []),
    ],
)
def test_who_is_wrong_follows_from_what_most_hold(of_ranks, wrong, unclear):
    assert _judge(of_ranks) == (wrong, unclear)
