"""Small tasks of lm-eval-harness from local files: each of its kinds of requests."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

WORDS = ["the", "model", "reads", "a", "line", "of", "text", "and", "writes", "what", "comes", "next", "in", "it"]


def write_tasks(folder: Path) -> list[str]:
    """Write task files, and return their names."""
    folder.mkdir()
    lines = [
        {
            "question": f"{' '.join(WORDS[: 3 + number % 7])} {number}:",
            "choices": [f" {word} {number}" for word in WORDS[number % 5 :: 4]],
            "gold": number % 3,
            "text": "\n".join(" ".join(WORDS[start:] + WORDS[:start]) for start in range(1 + 3 * (number % 4))),
        }
        for number in range(12)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    tasks = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "local_writing": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    return list(tasks)
