"""The words for what is wrong with a value."""

import subprocess
import sys

import pytest

from conf.problems import at_least, between, choice, exactly_one, positive, undecodable


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (choice("a.b", "x", ("y", "z")), "a.b: no such choice ('x'); choose one of y, z"),
        (choice("a.b", 4, (0, 1), "stage"), "a.b: no such stage (4); choose one of 0, 1"),
        (at_least("a.b", 0, 1), "a.b: must be at least 1 (0)"),
        (between("a.b", 3, 0, 2), "a.b: must be between 0 and 2 (3)"),
        (between("a.b", 3, 0, 2, "bytes"), "a.b: must be between 0 and 2 bytes (3)"),
        (positive("a.b", 0), "a.b: must be positive (0)"),
        (positive("a.b", float("nan")), "a.b: must be positive (nan)"),
        (exactly_one("a.b", {"b": 1, "c": 2}), "a.b: set exactly one of b (1) and c (2), the other to null"),
        (
            exactly_one("a.b", {"b": None, "c": None}),
            "a.b: none of b and c is set; set one of them",
        ),
    ],
)
def test_a_problem_is_one_line_with_key_value_and_advice(found, line):
    assert found == [line]


def test_bytes_that_are_no_utf_8_are_shown_as_what_they_are():
    texts = ["caf\u00e9", "name=caf\udce9", "\ud800"]
    reason = "holds bytes that are no UTF-8; give the text, or name the file, in UTF-8"
    assert undecodable(texts) == [f"name=caf\\xe9: {reason}", f"\\ud800: {reason}"]


def test_a_value_that_is_fine_gives_no_line():
    assert not choice("a", "y", ("y", "z"))
    assert not at_least("a", 1, 1) and not at_least("a", None, 1)
    assert not between("a", 0, 0, 2) and not between("a", 2, 0, 2)
    assert not positive("a", 0.1)
    assert not exactly_one("a", {"b": 0, "c": None})


def test_the_words_cost_no_import_of_hydra():
    command = "import sys; import conf, conf.problems; sys.exit('hydra' in sys.modules or 'omegaconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
