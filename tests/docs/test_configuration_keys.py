"""docs/configuration_keys.md says what the code says, and every field has an explanation."""

import dataclasses

import pytest

from conf import CONF_DIR
from tests.docs.configuration_keys import generator, run_keys
from tests.runs import ROOT


@pytest.fixture(scope="module")
def page():
    return generator().page()


def test_the_page_is_current(page):
    written = (ROOT / "docs" / "configuration_keys.md").read_text(encoding="utf-8")
    assert page == written, "run `make docs` and commit docs/configuration_keys.md"


def test_every_group_and_every_key_of_a_run_is_on_the_page(page):
    for key in run_keys():
        # Those of text that is tokenized on the way are the preparation's, which the page names once.
        assert f"`{key}`" in page or f"`{key}[I]`" in page or key.startswith("corpus.live."), key
    for group in (path for path in CONF_DIR.iterdir() if any(path.glob("*.yaml"))):
        for choice in group.glob("*.yaml"):
            assert group.name == "experiment" or f"`{choice.stem}`" in page, choice


@dataclasses.dataclass(frozen=True)
class Above:
    """A base."""

    # Explained
    # in two lines.
    first: int = 1


@dataclasses.dataclass(frozen=True)
class Below(Above):
    # Not of the field: the field stands further down.

    second: str = "a"
    third: float = 2.0


def test_a_field_without_a_comment_and_a_section_without_a_docstring_are_named():
    assert generator().comments(Below) == {"first": "Explained in two lines."}
    assert [line.split(".")[-1] for line in generator().undocumented(Below)] == [
        "second: no comment above the field",
        "third: no comment above the field",
        "Below: no docstring",
    ]
    assert generator().undocumented(Above) == []


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("| `name` | text | required | ", "no default"),
        ("| `training.micro_batch_size` | whole number | `2` | ", "the value of the default model's recipe"),
        ("| `corpus.weights` | mapping of text to number or null | `null` | ", "a mapping"),
        ('| `evaluation.sets.NAME.split` | text | `"validation"` | ', "a section under a name of the user's"),
        ("| `data.tolerance.rejected_fraction` | number | ", "of a preparation"),
    ],
)
def test_rows(page, row, why):
    assert row in page, why


def test_choices_are_those_that_validation_offers(page):
    (row,) = [line for line in page.splitlines() if line.startswith("| `tokenizer.model_type` |")]
    assert "bpe" in row and "unigram" in row
    (row,) = [line for line in page.splitlines() if line.startswith("| `corpus.packing` |")]
    assert "concatenate" in row and "best_fit" in row
