"""CI, the hooks of pre-commit and the Makefile run the same things."""

import re

import yaml

from tests.docs.documentation import PAGES
from tests.runs import ROOT


def recipes():
    """Target of the Makefile -> its commands."""
    found = re.findall(r"^([\w-]+):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    return {target: [line.strip() for line in lines.splitlines()] for target, lines in found}


def load(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_ci_calls_targets_of_the_makefile():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"make check", "make test"} <= set(runs)
    for run in runs:
        command, target = run.split()
        assert command == "make" and target in recipes()


def test_the_hooks_are_what_make_check_runs():
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]}
    check = {line.replace("$(VENV)", ".venv/bin").removesuffix(" .") for line in recipes()["check"]}
    assert hooks == check
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_make_targets_that_the_pages_name_exist():
    for page in PAGES:
        for target in re.findall(r"`make ([\w-]+)`", page.read_text(encoding="utf-8")):
            assert target in recipes(), f"{page}: make {target}"


def test_templates_for_issues_have_a_name_and_a_purpose():
    templates = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) >= 2
    for path in templates:
        head = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
        assert head["name"] and head["about"]
