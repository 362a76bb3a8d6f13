"""What is damaged, a run with its corpus and the models made of it, and the commands that a user runs on each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

# A command line: the name of one of driver.COMMANDS, and its arguments.
Command = list[str]

MODEL = [
    "model=tiny_mlstm",
    "model.vocab_size=320",
    # The narrowest that exports to transformers' xLSTM.
    "model.d_model=64",
    "model.n_blocks=1",
    "model.ffn_dim=64",
    "model.mlstm.n_heads=1",
    "model.mlstm.qk_dim_factor=1",
    "model.mlstm.reference_chunk_size=16",
]
LLAMA = [
    "name=llama",
    "model=tiny_llama",
    "model.vocab_size=320",
    "model.d_model=16",
    "model.n_blocks=1",
    "model.ffn_dim=32",
    "model.attention.n_heads=2",
    "model.attention.n_kv_heads=1",
]
SETTINGS = [
    "corpus.directory=corpus",
    "recipe=none",
    "parallel=zero0",
    "schedule=constant",
    "precision=fp32",
    "optimizer.learning_rate=1e-2",
    "training.sequence_length=16",
    "training.global_batch_size=2",
    "training.micro_batch_size=2",
    "training.cpu_threads=1",
    "corpus.max_epochs=1000",
    "evaluation.batch_size=2",
    "evaluation.interval=1",
    "evaluation.sets.validation.max_tokens=32",
    "checkpoint.interval=1",
    "logging.interval=1",
    "logging.monitor_interval=1",
    "logging.csv=true",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
    "logging.samples.interval=1",
    "logging.samples.max_new_tokens=2",
]
RUN = ["name=run", *SETTINGS, *MODEL]
NEW_RUN = [*RUN, "name=new", "training.total_steps=1"]
LONGER = [*RUN, "training.total_steps=3"]
PREPARE = [
    "prepare",
    "data=text",
    "source=text",
    "data.split.validation_fraction=0.2",
    "tokenizer=sentencepiece_4k",
    "tokenizer.vocab_size=320",
    "shard_bytes=4000",
    "unit_bytes=6000",
]

# In the order in which they make what is damaged.
MAKE: list[Command] = [
    ["data_pipeline", *PREPARE, "output=corpus"],
    [
        "data_pipeline",
        *PREPARE,
        "source=more",
        "tokenizer=file",
        "tokenizer.path=corpus/tokenizer",
        "output=other",
    ],
    ["train", *RUN, "training.total_steps=2"],
    ["model", "export", "checkpoint=runs/run", "output=exported", "verify=false"],
    ["model", "import", "source=exported", "output=weights"],
    ["checkpoint", "consolidate", "runs/run", "--output", "whole"],
    ["train", *SETTINGS, *LLAMA, "training.total_steps=1"],
    ["model", "export", "checkpoint=runs/llama", "output=exported_llama", "verify=false"],
]


def _of_model(name: str, *evaluation: str) -> list[Command]:
    """What takes any model."""
    return [
        ["model", "describe", name],
        ["model", "generate", f"checkpoint={name}", "prompt=a b", "max_new_tokens=2"],
        ["model", "average", name, "runs/run@1", "output=mean"],
        ["evaluate", name, *evaluation],
        ["train", *NEW_RUN, f"initialise_from={name}"],
    ]


_EVALUATION = ["corpus.directory=corpus", "training.sequence_length=16", "evaluation.sets.validation.max_tokens=32"]
_OF_RUN: list[Command] = [
    *_of_model("runs/run"),
    ["train", *LONGER],
    ["train", *LONGER, "checkpoint.on_corrupt=fail"],
    ["train", *RUN, "training.total_steps=2"],
    ["train", *LONGER, "--plan"],
    ["train", "--config", "runs/run", "name=new", "training.total_steps=1"],
    ["train", *LONGER, "name=new", "resume_from=runs/run@2"],
    ["model", "export", "checkpoint=runs/run@2", "output=again"],
    ["checkpoint", "list", "runs/run"],
    ["checkpoint", "verify", "runs/run", "--all"],
    ["checkpoint", "describe", "runs/run@2"],
    ["checkpoint", "consolidate", "runs/run", "--output", "again"],
    ["checkpoint", "prune", "runs/run", "--keep-last", "1"],
    ["checkpoint", "keep", "runs/run@1"],
    ["checkpoint", "release", "runs/run"],
    ["report", "runs/run"],
    ["report", "runs/run", "runs/run"],
    ["data_pipeline", "inspect", "corpus", "--sample", "1", "--run", "runs/run"],
]
_OF_CORPUS: list[Command] = [
    ["train", *NEW_RUN],
    ["train", *NEW_RUN, "corpus.on_corrupt=skip"],
    ["train", *NEW_RUN, "corpus.packing=best_fit"],
    ["train", *LONGER],
    ["evaluate", "runs/run"],
    ["data_pipeline", "inspect", "corpus"],
    ["data_pipeline", "inspect", "corpus", "--sample", "1", "--sequence-length", "16"],
    ["data_pipeline", "verify", "corpus"],
    ["data_pipeline", "merge", "corpus", "other", "--output", "merged"],
    ["data_pipeline", "split", "corpus", "--split", "train", "--output", "part"],
    ["data_pipeline", *PREPARE, "output=corpus"],
]
_OF_UNFINISHED: list[Command] = [
    ["data_pipeline", *PREPARE, "output=unfinished"],
    ["data_pipeline", *PREPARE, "output=unfinished"],
    ["data_pipeline", "verify", "unfinished"],
    ["data_pipeline", "inspect", "unfinished"],
]
_OF_LLAMA: list[Command] = [
    ["model", "import", "source=exported_llama", "output=again"],
    ["model", "generate", "checkpoint=exported_llama", "prompt=a b", "max_new_tokens=2"],
    ["model", "average", "exported_llama", "runs/llama", "output=mean"],
    ["evaluate", "exported_llama", *_EVALUATION],
]


@dataclass(frozen=True)
class Group:
    """Files that the same commands read."""

    # Below the folder of a case.
    folder: str
    commands: list[Command]
    # Checkpoints have commands of their own, and text is nothing of ours.
    leave_out: tuple[str, ...] = ()

    def files(self, root: Path) -> list[str]:
        """Paths below `root`, sorted."""
        found = (path.relative_to(root).as_posix() for path in (root / self.folder).rglob("*") if path.is_file())
        return sorted(path for path in found if not path.startswith(self.leave_out or ("\0",)))


GROUPS = (
    Group("runs/run", _OF_RUN, ("runs/run/checkpoints/",)),
    Group("runs/run/checkpoints/step-00000002", _OF_RUN),
    Group("corpus", _OF_CORPUS),
    Group("unfinished", _OF_UNFINISHED),
    Group("exported", [*_of_model("exported", *_EVALUATION), ["model", "import", "source=exported", "output=again"]]),
    Group("exported_llama", _OF_LLAMA),
    Group("whole", _of_model("whole", *_EVALUATION)),
    Group("weights", [*_of_model("weights", *_EVALUATION), ["model", "export", "checkpoint=weights", "output=again"]]),
)


def pairs(root: Path) -> list[tuple[str, Command]]:
    """Every file of every group with every command of it, in an order that mixes them."""
    found = [(file, command) for group in GROUPS for file in group.files(root) for command in group.commands]
    Random(0).shuffle(found)
    return found


def sign(root: Path, changed: str) -> None:
    """Bring the checksums that tell of the change of a file up to date: as who alters a file on purpose would."""
    from data_pipeline.corpus.manifest import fingerprint_of
    from train.checkpoints.layout import MARKER, describe_file

    path = root / changed
    if not path.is_file():
        return
    for folder in _parents(root, path):
        marker = folder / MARKER
        if marker.is_file() and path != marker:
            document = json.loads(marker.read_text())
            document["files"][path.relative_to(folder).as_posix()] = describe_file(path)
            marker.write_text(json.dumps(document))
        manifest = folder / "manifest.json"
        if manifest.is_file():
            document = json.loads(manifest.read_text())
            if not isinstance(document, dict):
                return
            document.pop("fingerprint", None)
            name = path.relative_to(folder).as_posix()
            _sign_entry(document, name, path)
            if name.startswith("shards/"):
                document["shards"] = _sign_shard(folder, document["shards"], name)
            manifest.write_text(json.dumps({**document, "fingerprint": _fingerprint(fingerprint_of, document)}))


def _sign_shard(folder: Path, table: dict, name: str) -> dict:
    """Write a table of shards that knows the shard `name` as it is now; returns what the manifest says of the table."""
    from data_pipeline.corpus.files import hash_file
    from data_pipeline.corpus.shard_table import ShardTable, ShardTableEntry

    found = asdict(hash_file(folder / name))
    entries = ShardTable.read(folder, ShardTableEntry(**table))
    changed = ShardTable.from_entries(replace(entry, **found) if entry.file == name else entry for entry in entries)
    changed.write(folder)
    return asdict(changed.entry)


def _parents(root: Path, path: Path) -> Iterator[Path]:
    for parent in path.parents:
        if parent == root:
            return
        yield parent


def _fingerprint(fingerprint_of: Callable[[object], str], document: object) -> str:
    try:
        return fingerprint_of(document)
    except ValueError:
        return "0" * 64


def _sign_entry(document: dict, name: str, path: Path) -> None:
    from data_pipeline.corpus.files import hash_file

    found = hash_file(path)
    for entry in document.values():
        if isinstance(entry, dict) and entry.get("file") == name:
            values = {"bytes": found.bytes, "sha256": found.sha256, "xxh3_128": found.xxh3_128}
            entry.update({key: value for key, value in values.items() if key in entry})
