"""Imports run one way, and files stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "model": {"kernels", "conf"},
    "data_pipeline": {"conf"},
    "train": {"model", "data_pipeline", "kernels", "conf"},
    "launch": {"train", "model", "data_pipeline", "kernels", "conf"},
    "conf": set(),
    "benchmarks": {"train", "model", "data_pipeline", "kernels", "conf"},
}
PACKAGES = set(MAY_IMPORT)
# Where a package's command line or configuration meets the values; library code takes dataclasses.
READ_VALUES = {
    "train/__main__.py",
    "model/__main__.py",
    "model/command_settings.py",
    "model/generate_command.py",
    "model/presets.py",
    "model/server/command.py",
    "data_pipeline/__main__.py",
    "train/checkpoint.py",
    "train/command.py",
    "train/evaluate/__main__.py",
    "train/evaluate/command.py",
    "train/report/__main__.py",
    "train/report/runs.py",
    "train/evaluate/target.py",
    "train/evaluate/suites/command.py",
    "train/evaluate/suites/suites.py",
    "train/requirements.py",
    "train/context.py",
    "train/run.py",
    "launch/__main__.py",
    "launch/calibrate.py",
    "launch/cancel.py",
    "launch/demo.py",
    "launch/fork.py",
    "launch/job.py",
    "launch/logs.py",
    "launch/planner/command.py",
    "launch/reproduce/command.py",
    "launch/reproduce/plan.py",
    "launch/scaling/collect.py",
    "launch/slurm.py",
    "launch/status.py",
    "launch/submit.py",
    "launch/sweep/arrays.py",
    "launch/sweep/command.py",
    "launch/sweep/grid.py",
    "launch/sweep/local.py",
    "launch/sweep/manifest.py",
    "launch/sweep/plan.py",
    "launch/sweep/rows.py",
}
# How to speak of values that are wrong, and to whom, and which files may be touched; they import nothing, so that every
# package may import them.
SHARED = (
    "conf.problems",
    "conf.lasting_output",
    "conf.named_files",
    "conf.stored_values",
    "conf.passwords",
    "conf.slurm_variables",
    "conf.settings",
)
# The command line of the model turns text into tokens and describes runs; the library does neither.
EXCEPTIONS = {
    ("model/__main__.py", "data_pipeline"),
    ("model/__main__.py", "train"),
    ("model/generate_command.py", "data_pipeline"),
    ("model/server/command.py", "data_pipeline"),
}
# The rooms of data_pipeline, and which others each may import; all of them may import its `errors`.
DATA_ROOMS = {
    "tokenizing": set(),
    "sources": set(),
    "corpus": {"tokenizing"},
    "ordering": {"corpus"},
    "preparing": {"tokenizing", "sources", "corpus", "ordering"},
    "tasks": {"ordering"},
    "reading": {"tokenizing", "sources", "corpus", "ordering", "tasks"},
}
FILES = [path for package in sorted(PACKAGES) for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path):
    """Names of the modules that a file imports, wherever in it; what `from package import module` names included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(path):
    names = (name for name in imported_modules(path) if not name.startswith(SHARED))
    yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    relative = str(path.relative_to(ROOT))
    package = relative.split("/")[0]
    for imported in set(imported_packages(path)) & PACKAGES - {package}:
        if (relative, imported) in EXCEPTIONS:
            continue
        assert imported in MAY_IMPORT[package], f"{relative} imports {imported}"
        if imported == "conf":
            assert relative in READ_VALUES, f"{relative} reads configuration values; pass it dataclasses"


def test_what_every_package_may_import_imports_no_package():
    for module in SHARED:
        assert not set(imported_packages(ROOT / f"{module.replace('.', '/')}.py")) & PACKAGES


def test_the_rooms_of_the_data_pipeline_are_layers():
    assert {path.parent.name for path in (ROOT / "data_pipeline").glob("*/__init__.py")} == set(DATA_ROOMS)
    for room, others in DATA_ROOMS.items():
        for path in (ROOT / "data_pipeline" / room).rglob("*.py"):
            modules = (name.split(".") for name in imported_modules(path) if name.startswith("data_pipeline."))
            found = {parts[1] for parts in modules} - {room, "errors", "network"}
            assert found <= others, f"{path.relative_to(ROOT)} imports {', '.join(sorted(found - others))}"
    assert not [name for name in imported_modules(ROOT / "data_pipeline/errors.py") if name.startswith("data_pipeline")]


def runtime_imports(path):
    """The modules of this tree that a file imports but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            # What a package's file is asked for may be one of its modules.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if module_file(name) else node.module for name in names)


def module_file(name):
    path = ROOT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_no_module_imports_itself_by_way_of_others():
    files = FILES
    imports = {path: {file for name in runtime_imports(path) if (file := module_file(name))} for path in files}
    for path in files:
        reached, ahead = set(), set(imports[path])
        while ahead:
            reached |= ahead
            ahead = {further for file in ahead for further in imports.get(file, ())} - reached
        assert path not in reached, f"{path} imports itself by way of {sorted(map(str, reached & set(files)))}"


# The public operations and readers, whose arguments are named one by one where they are called.
MAY_HAVE_MANY_PARAMETERS = {
    ("kernels/mlstm/__init__.py", "mlstm"),
    ("kernels/mlstm/__init__.py", "mlstm_state"),
    ("kernels/mlstm/step.py", "mlstm_step"),
    ("model/generation/generating.py", "generate"),
    ("data_pipeline/reading/stream.py", "__init__"),
    ("data_pipeline/reading/loader.py", "__init__"),
}


def test_functions_have_at_most_eight_parameters():
    found = set()
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or relative.startswith("benchmarks/"):
                continue
            # Triton's language has no records to pass.
            if any("triton" in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len([a for a in arguments if a.arg not in ("self", "cls", "ctx")]) > 8:
                found.add((relative, node.name))
    assert found == MAY_HAVE_MANY_PARAMETERS


@pytest.mark.parametrize("package", ["kernels", "model", "data_pipeline"])
def test_only_the_trainer_knows_process_groups(package):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.distributed" not in text and "deepspeed" not in text.lower().replace("deepspeed's", ""), path


def test_only_the_engines_know_deepspeed():
    knowing = {path.relative_to(ROOT).as_posix() for path in FILES if "deepspeed" in set(imported_packages(path))}
    named = ("pipeline", "pipeline_schedule", "zero", "zero_fragments")
    assert knowing == {f"train/parallel/{name}.py" for name in named}


def names_used(path):
    """Every name that the code of a file imports, reads or sets: modules, variables, attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.id


def test_no_other_file_reaches_for_what_the_engines_wrap():
    """Attributes count as imports do: `engine.deepspeed.x` would tie a file to one engine."""
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        reaching = {name for name in names_used(path) if "deepspeed" in name.lower()}
        assert relative.startswith(("train/parallel/zero", "train/parallel/pipeline")) or not reaching, (
            f"{relative}: {reaching}"
        )


def test_every_collective_goes_through_the_mesh():
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        used = {name for name in names_used(path) if name.startswith(("torch.distributed", "dist."))}
        if relative == "train/parallel/board.py":
            used -= {"torch.distributed", "dist.Store", "dist.TCPStore", "dist.PrefixStore", "dist.DistNetworkError"}
        assert relative == "train/parallel/mesh.py" or not used, f"{relative}: {used}"


def test_no_file_is_longer_than_500_lines():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_nothing_names_a_path_of_one_machine():
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    for path in [*FILES, *pages, ROOT / "README.md", ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8")
        for prefix in ("/work/", "/root/", "/home/"):
            assert prefix not in text, f"{path} names {prefix}"


def test_tests_are_one_package_and_import_their_helpers_by_full_names():
    files = sorted((ROOT / "tests").rglob("*.py"))
    modules = {path.stem for path in files}
    for path in files:
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} lacks an __init__.py"
        assert not modules & set(imported_packages(path)), f"{path}: import helpers as tests.<folder>.<file>"
