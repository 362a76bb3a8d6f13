"""Files of calibrations: written and read back, and refused with what to do."""

import dataclasses
import json
import re

import pytest

from conf.problems import ConfigError
from tests.train.estimate import invented_gpu
from train.estimate.calibration import (
    SHIPPED,
    CollectivePoint,
    RunPoint,
    read_calibration,
    shipped,
)


def whole():
    return dataclasses.replace(
        invented_gpu.bare(),
        steps=invented_gpu.steps(),
        collectives=[CollectivePoint("all_reduce", 1, 2, 2**29, 0.003)],
        runs=[RunPoint("xlstm_160m", {"micro_batch_size": 2}, {"zero_stage": 2}, 1, 1, 1000.0, None, "a test")],
    )


def test_a_file_is_read_as_it_was_written(tmp_path):
    calibration = whole()
    calibration.write(tmp_path / "gpu.json")
    assert read_calibration(tmp_path / "gpu.json") == calibration
    # A point a line: such files are compared by eye and by git.
    lines = (tmp_path / "gpu.json").read_text().splitlines()
    assert len([line for line in lines if '"tokens"' in line]) == len(calibration.products)


def refusal(tmp_path, change):
    path = tmp_path / "gpu.json"
    whole().write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_calibration(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "a later version wrote it: upgrade"),
        (lambda c: c.pop("products"), "products is empty"),
        (lambda c: c["products"][0].update(seconds=0), r"products\[0\].seconds must be positive \(0\)"),
        (lambda c: c["products"][0].update(second=1), "holds no calibration"),
        (lambda c: c["cells"][1].update(heads=-1), r"cells\[1\].heads must be positive \(-1\)"),
        (lambda c: c.update(copy_bytes_per_second=None), "holds no calibration"),
        (lambda c: c.pop("device"), "holds no calibration"),
        (lambda c: c.update(steps=3), "holds no calibration"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_fault(tmp_path, change, message):
    found = refusal(tmp_path, change)
    assert re.search(message, found) and ("measure again" in found or "upgrade" in found)


def test_a_missing_or_torn_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read .*; name a file of `python -m launch calibrate`"):
        read_calibration(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format_version": 1, ')
    with pytest.raises(ConfigError, match="cannot be read"):
        read_calibration(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds no calibration"):
        read_calibration(tmp_path / "list.json")


def test_those_that_ship_can_be_read_and_say_where_they_are_from():
    assert {"h100", "h200"} <= set(shipped())
    for name in shipped():
        calibration = read_calibration(SHIPPED / f"{name}.json")
        assert name.upper() in calibration.device
        assert calibration.provenance["date"] and calibration.provenance["torch"]
        assert {"mlstm", "slstm"} <= {point.kind for point in calibration.cells}
