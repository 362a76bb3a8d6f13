"""fit.json: what predictions need of a fit, resamples included.

`{"format_version": 1, "groups": [...]}`; a group has `family`, `context`, `most_flops`, `token_cost` (factors of N^(1,
2/3, 1/3), the smallest size for which it holds, its greatest error), `power_laws` by axis and `loss_laws`. Draws are
lists, one entry for each resample; null where it has none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from conf.problems import other_format
from launch.scaling.isoflop import Axis, PowerLaw
from launch.scaling.parametric import LossLaw
from launch.scaling.predict import GroupModel
from launch.scaling.runs import Group
from launch.scaling.token_cost import TokenCost

FORMAT_VERSION = 1


def as_json(models: Sequence[GroupModel]) -> str:
    """The text of fit.json."""
    groups = [
        {
            "family": model.group.family,
            "context": model.group.context,
            "most_flops": model.most_flops,
            "token_cost": {
                "factors": model.cost.factors,
                "smallest": model.cost.smallest,
                "error": model.cost.error,
            },
            "power_laws": {
                axis: {"log_factor": law.log_factor, "exponent": law.exponent, "draws": _plain(law.draws)}
                for axis, law in model.power_laws.items()
            },
            "loss_laws": [
                {
                    "coefficients": _plain(law.coefficients),
                    "draws": _plain(law.draws),
                    "free_gamma": law.free_gamma,
                    "runs": law.runs,
                    "starts": law.starts,
                    "residuals": _plain(law.residuals),
                }
                for law in model.loss_laws
            ],
        }
        for model in models
    ]
    return json.dumps({"format_version": FORMAT_VERSION, "groups": groups}) + "\n"


def read_fit(path: Path) -> list[GroupModel]:
    """What `as_json` wrote. `path`: the file, or the folder that holds fit.json.

    Raises ValueError where there is none, it is no fit, or a later version wrote it.
    """
    file = path / "fit.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; make it with `sweep fit RUNS.csv --output {path}`") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{file}: is no fit; name the folder that `sweep fit` wrote, or its fit.json")
    if problem := other_format(file, content["format_version"], FORMAT_VERSION):
        raise ValueError(problem)
    try:
        return [_group(stored) for stored in content["groups"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: is damaged ({type(error).__name__}: {error}); fit the runs again") from None


def _group(stored: dict[str, Any]) -> GroupModel:
    cost = stored["token_cost"]
    power_laws = {
        cast(Axis, axis): PowerLaw(law["log_factor"], law["exponent"], _array(law["draws"]))
        for axis, law in stored["power_laws"].items()
    }
    loss_laws = [
        LossLaw(
            coefficients=_array(law["coefficients"]),
            draws=_array(law["draws"]),
            free_gamma=law["free_gamma"],
            runs=law["runs"],
            starts=(law["starts"][0], law["starts"][1]),
            residuals=_array(law["residuals"]),
        )
        for law in stored["loss_laws"]
    ]
    return GroupModel(
        group=Group(stored["family"], stored["context"]),
        most_flops=stored["most_flops"],
        power_laws=power_laws,
        loss_laws=loss_laws,
        cost=TokenCost(tuple(cost["factors"]), cost["smallest"], cost["error"]),
    )


def _plain(values: np.ndarray) -> list[Any]:
    """Lists of numbers; null for those that are not finite, which JSON has no word for."""
    found = []
    for value in values.tolist():
        found.append(_plain(np.array(value)) if isinstance(value, list) else (value if math.isfinite(value) else None))
    return found


def _array(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=float)
