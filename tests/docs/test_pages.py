"""Links lead somewhere, and files, functions and configuration keys that a page names exist."""

import importlib
import re
from xml.etree import ElementTree

import pytest

from tests.docs.configuration_keys import all_keys
from tests.docs.documentation import PAGES, name
from tests.runs import ROOT

# The log tells of files as they were.
PRESENT = [page for page in PAGES if page.name != "log.md"]
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "corpora"}
FILES = (".json", ".jsonl", ".model", ".md", ".py", ".safetensors")
SECTIONS = {key.split(".")[0] for key in all_keys() if "." in key}


def prose(page):
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page):
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_reached_from_the_index():
    seen, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if ".md" in link]
    assert {name(page) for page in (ROOT / "docs").rglob("*.md")} <= {name(page) for page in seen}


def quoted(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", PRESENT, ids=name)
def test_files_that_a_page_names_exist(page):
    for words in quoted(page):
        for word in words.split():
            path = word.strip("'\",;")
            if path.split("/")[0] not in FOLDERS or not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?", path):
                continue
            # CHOICE stands for any choice, `train/...` for many names that are no files.
            if re.search(r"\b[A-Z]{4,}\b|\.\.\.", path):
                continue
            assert list(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"


@pytest.mark.parametrize("page", PRESENT, ids=name)
def test_functions_that_a_page_names_exist(page):
    for word in quoted(page):
        if not re.fullmatch(r"(conf|data_pipeline|kernels|train|launch)(\.\w+)+", word):
            continue
        # A group of configuration keys and a package have one name; a batch script is no module.
        if word.endswith(".sbatch") or any(key == word or key.startswith(f"{word}.") for key in all_keys()):
            continue
        parts = word.split(".")
        found = importlib.import_module(parts[0])
        for position, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:position]))
            found = getattr(found, part)


# `data_formats.md` has keys of files, `training.md` events, beside those of the configuration.
@pytest.mark.parametrize("page", [page for page in PRESENT if page.name != "data_formats.md"], ids=name)
def test_configuration_keys_that_a_page_names_exist(page):
    keys = all_keys()
    for words in quoted(page):
        word = words.split("=")[0].lstrip("+")
        if not re.fullmatch(r"\w+(\.[\w*]+)+", word) or word.split(".")[0] not in SECTIONS:
            continue
        if word.endswith(FILES) or word.startswith("launch.scaling."):
            continue
        wanted = re.sub(r"evaluation\.sets\.\w+", "evaluation.sets.NAME", word).removesuffix(".*")
        assert any(key == wanted or key.startswith(f"{wanted}.") for key in keys), f"no such key: {word}"


def test_the_picture_of_the_architecture_names_every_package():
    drawn = ElementTree.parse(ROOT / "docs" / "images" / "architecture.svg").getroot()
    names = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "name"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests", "docs"}
    # Templates of `launch`.
    packages.remove("slurm")
    assert packages <= names


def test_no_page_names_a_path_of_one_machine():
    for page in PAGES:
        for prefix in ("/work/", "/root/", "/home/"):
            assert prefix not in page.read_text(encoding="utf-8"), f"{name(page)} names {prefix}"
