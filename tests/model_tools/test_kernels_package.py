"""The real Hugging Face package `kernels` beside ours, in fresh processes, in either order on sys.path."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

from tests.runs import PATIENCE

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
PINNED = "0.17.2"

USE_BOTH = """
import torch
from transformers import AutoModelForCausalLM, xLSTMConfig
from transformers.utils.import_utils import is_kernels_available
import datasets
from kernels.mlstm import mlstm
import kernels.head_norm

model = AutoModelForCausalLM.from_config(xLSTMConfig(hidden_size=128, num_hidden_layers=1, num_heads=2, vocab_size=64))
assert model(torch.zeros(1, 5, dtype=torch.int64)).logits.shape == (1, 5, 64)
q = torch.ones(1, 3, 2, 4)
h, _ = mlstm(q, q, q, torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
assert h.shape == (1, 3, 2, 4)
"""
HUGGING_FACE_NAMES = """
from kernels import Device, LayerRepository, get_kernel, use_kernel_forward_from_hub
from kernels.layer.mode import Mode
assert kernels.Mode is Mode and kernels.Device is Device and Device("cpu").type == "cpu"
"""


def pip_install(target, requirement):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), requirement]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="session")
def pinned(tmp_path_factory):
    target = tmp_path_factory.mktemp("kernels_pinned")
    done = pip_install(target, f"kernels=={PINNED}")
    if done.returncode:
        pytest.skip(f"the package index is out of reach: {done.stderr.strip().splitlines()[-1]}")
    return target


@pytest.fixture(scope="session")
def viable(pinned, tmp_path_factory):
    """A version that transformers uses; from an index without one, the pinned code labelled as the lowest such."""
    target = tmp_path_factory.mktemp("kernels_viable")
    if pip_install(target, f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}").returncode:
        pip_install(target, f"kernels=={PINNED}")
        metadata = target / f"kernels-{PINNED}.dist-info" / "METADATA"
        text = metadata.read_text(encoding="utf-8")
        metadata.write_text(text.replace(f"Version: {PINNED}", f"Version: {KERNELS_MIN_VERSION}"), encoding="utf-8")
        metadata.parent.rename(target / f"kernels-{KERNELS_MIN_VERSION}.dist-info")
    return target


def run(code, paths, cwd):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A process of these takes six seconds: of the eight combinations, every pair of two occurs.
MODEL_WITH_OURS_FIRST = pytest.mark.parametrize(
    ("start", "ours_first"),
    [("import model.config", True), ("import transformers", False)],
    ids=["model, ours first on the path", "transformers, theirs first on the path"],
)
MODEL_WITH_THEIRS_FIRST = pytest.mark.parametrize(
    ("start", "ours_first"),
    [("import model.config", False), ("import transformers", True)],
    ids=["model, theirs first on the path", "transformers, ours first on the path"],
)


@MODEL_WITH_OURS_FIRST
def test_version_that_transformers_uses(viable, tmp_path, start, ours_first):
    paths = [REPOSITORY, viable] if ours_first else [viable, REPOSITORY]
    code = f"{start}\nimport model.config\n{USE_BOTH}\nassert is_kernels_available()\n{HUGGING_FACE_NAMES}"
    run(code, paths, tmp_path)


def test_theirs_loaded_before_ours(viable, tmp_path):
    code = "import kernels, transformers.integrations.hub_kernels\n"
    code += f"assert {str(viable)!r} in kernels.__file__\nimport model.config\n{USE_BOTH}\n{HUGGING_FACE_NAMES}"
    run(code, [viable, REPOSITORY], tmp_path)


@MODEL_WITH_THEIRS_FIRST
def test_version_that_transformers_ignores(pinned, tmp_path, start, ours_first):
    paths = [REPOSITORY, pinned] if ours_first else [pinned, REPOSITORY]
    code = f"{start}\nimport model.config\n{USE_BOTH}\nassert not is_kernels_available()\n{HUGGING_FACE_NAMES}"
    run(code, paths, tmp_path)


def test_without_theirs(tmp_path):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
    code = f"{USE_BOTH}\nassert not is_kernels_available()\nassert not hasattr(kernels, 'Device')\n"
    run(code, [REPOSITORY], tmp_path)


def test_our_names_do_not_load_theirs(viable, tmp_path):
    code = "from kernels import mlstm, head_norm\nimport sys\nassert 'kernels.layer' not in sys.modules"
    run(code, [REPOSITORY, viable], tmp_path)


def test_no_module_of_ours_hides_one_of_theirs(pinned):
    def names(directory):
        return {path.stem for path in directory.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}

    assert names(REPOSITORY / "kernels") & names(pinned / "kernels") == {"__init__"}


def test_one_directory_for_both_is_explained(viable, tmp_path):
    """Both installed into one site-packages: our __init__.py has overwritten theirs."""
    site = tmp_path / "site"
    metadata = next(viable.glob("kernels-*.dist-info"))
    (site / metadata.name).mkdir(parents=True)
    (site / metadata.name / "METADATA").write_bytes((metadata / "METADATA").read_bytes())
    code = (
        "import kernels.mlstm\n"
        "try:\n    from kernels import Device\n"
        "except ImportError as error:\n    print(error)\n"
        "else:\n    raise SystemExit('no error')"
    )
    message = run(code, [REPOSITORY, site], tmp_path)
    assert f"'Device' was asked of the Hugging Face package 'kernels' {KERNELS_MIN_VERSION}" in message
    assert "pip install -e" in message


def test_no_module_of_ours_has_the_name_of_one_of_theirs(pinned):
    def names(folder):
        return {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}

    theirs = names(pinned / "kernels") - {"__init__"}
    assert "layer" in theirs
    assert not theirs & names(REPOSITORY / "kernels")
