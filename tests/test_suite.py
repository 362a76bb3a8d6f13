"""What one test leaves behind does not reach the next."""

import os

import pytest


@pytest.mark.parametrize("turn", [1, 2])
def test_variables_of_the_environment_are_as_before(turn):
    assert "LEFT_BY_A_TEST" not in os.environ and os.environ["PATH"]
    os.environ["LEFT_BY_A_TEST"] = str(turn)
