"""docs/make_configuration_keys.py as a module, and the keys that it finds."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType

from conf import compose
from data_pipeline.preparing.config import PrepareConfig
from launch.calibrate import CalibrateConfig
from launch.job import SubmitConfig
from launch.planner.command import PlanConfig
from launch.reproduce.config import Reproduction
from launch.sweep.config import SweepPlanConfig
from tests.runs import ROOT
from train.config import RunConfig
from train.evaluate.suites.suites import schema_of, suite_named, suite_names


@functools.cache
def generator() -> ModuleType:
    path = ROOT / "docs" / "make_configuration_keys.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


@functools.cache
def some_run() -> RunConfig:
    return compose(RunConfig, "train", ["name=NAME", "corpus.directory=DIR", "training.total_steps=1000"])


@functools.cache
def run_keys() -> tuple[str, ...]:
    """Every key of a run that holds a value and no section."""
    return _keys(some_run())


@functools.cache
def all_keys() -> tuple[str, ...]:
    others = {
        PrepareConfig: ("prepare", ["output=DIR"]),
        SubmitConfig: ("submit", []),
        SweepPlanConfig: ("sweep", []),
        PlanConfig: ("plan", []),
        CalibrateConfig: ("calibrate", []),
        Reproduction: ("reproduce", []),
    }
    suites = {schema_of(suite_named(name)): ("suite", [f"suite={name}"]) for name in suite_names()}
    return run_keys() + tuple(
        key for schema, given in {**others, **suites}.items() for key in _keys(compose(schema, *given))
    )


def _keys(tree: object) -> tuple[str, ...]:
    return tuple(
        f"{section.path}{field}"
        for section in generator().sections(tree)
        for field, annotation in generator().field_types(section.schema).items()
        if generator().section_type(annotation) is None
    ) + tuple(section.path.rstrip(".").removesuffix("[I]") for section in generator().sections(tree) if section.path)
