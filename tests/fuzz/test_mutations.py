"""The changes that the fuzzer makes are files that can be written, and do not change the ones after them."""

import copy
import json
from random import Random

from tests.fuzz import mutations


def test_changed_json_can_be_written_and_leaves_the_strange_values_as_they_are():
    strange = copy.deepcopy(mutations.STRANGE)
    for seed in range(3000):
        json.dumps(mutations.change_json({"a": [1, {"b": 2}], "c": {}}, Random(seed)))
    # By their text: NaN is among them.
    assert repr(mutations.STRANGE) == repr(strange)
