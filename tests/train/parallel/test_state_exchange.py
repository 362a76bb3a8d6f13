"""Which way of scanning is chosen, and what each would receive. The scans themselves: test_sequence.py."""

import pytest

from train.parallel.state_exchange import EXCHANGES, Links, choose

# The mLSTM's state of one sequence of the 7B: 8 heads of 256 x 512.
STATE = 4 * 8 * (256 * 512 + 256 + 2)


@pytest.mark.parametrize(
    ("links", "message", "expected"),
    [
        (Links(2, 1), STATE, "all_gather"),
        (Links(8, 1), STATE, "all_gather"),
        (Links(16, 2), STATE, "recursive_doubling"),
        (Links(64, 8), STATE, "recursive_doubling"),
        # Large messages: what counts is how often they are sent.
        (Links(8, 8), 64 * STATE, "ring"),
    ],
)
def test_auto_chooses_by_ranks_hosts_and_size_and_says_why(links, message, expected):
    choice = choose("auto", links, message)
    assert choice.exchange.name == expected
    assert choice.reason.startswith(f"{expected} for {links} and ")
    assert all(name in choice.reason for name in EXCHANGES)


def test_a_named_exchange_is_taken():
    choice = choose("ring", Links(2, 1), STATE)
    assert (choice.exchange.name, choice.reason) == ("ring", "ring, as the configuration says")


def test_what_ranks_receive():
    """Of 8 ranks, in messages; a ring repeats the two logarithms of a row in each of its parts."""
    received = {
        name: [way.received_elements(place, 8, 16, 102) / (16 * 102) for place in range(8)]
        for name, way in EXCHANGES.items()
    }
    assert received == {
        "all_gather": [7] * 8,
        "recursive_doubling": [0, 1, 2, 2, 3, 3, 3, 3],
        "ring": [0] + [1] * 7,
    }
