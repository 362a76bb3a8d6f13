"""Ranks that share a sequence compute what one process computes, in float64, over gloo."""

import json

import pytest

from tests.runs import ROOT, run_script
from tests.train.parallel.sequence_ranks import CELL_CASES, cases, cell_name

RANKS = (2, 3, 4, 8)
TOLERANCE = 1e-10
_found: dict[int, dict[str, dict[str, float]]] = {}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """ranks -> case -> number -> value; all cases of a number of ranks are run by one start of them."""

    def of_ranks(ranks):
        if ranks not in _found:
            file = tmp_path_factory.mktemp("ranks") / f"{ranks}.json"
            done = run_script(ROOT / "tests/train/parallel/sequence_ranks.py", [str(file)], processes=ranks)
            assert done.returncode == 0, done.stderr
            _found[ranks] = json.loads(file.read_text())
        return _found[ranks]

    return of_ranks


def too_large(numbers):
    return {name: value for name, value in numbers.items() if "exchanges" not in name and not value <= TOLERANCE}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CELL_CASES, ids=lambda case: cell_name(*case))
def test_the_cell_is_that_of_one_process(results, ranks, case):
    """Outputs, the state at the end, the gradients of gates and both states, and the bytes received as by formula."""
    numbers = results(ranks)[cell_name(*case)]
    assert len(numbers) == 13 and not too_large(numbers)


OTHERS = [(ranks, name) for ranks in RANKS for name, *_ in cases(ranks) if not name.startswith("cell")]


@pytest.mark.parametrize(("ranks", "case"), OTHERS)
def test_layers_are_those_of_one_process(results, ranks, case):
    numbers = results(ranks)[case]
    assert len(numbers) >= 2 and not too_large(numbers)


@pytest.mark.parametrize("name", ["hybrid", "neurips_mlstm_and_slstm"])
def test_what_is_recomputed_exchanges_nothing(results, name):
    counts = [
        (numbers["exchanges forward"], numbers["exchanges backward"])
        for case, numbers in results(2).items()
        if case.startswith(f"model {name}, ")
    ]
    assert len(counts) == 3 and len(set(counts)) == 1 and min(counts[0]) > 0
