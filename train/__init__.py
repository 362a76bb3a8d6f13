"""The run: configuration, plan, DeepSpeed engine, training loop, checkpoints, callbacks, evaluation."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed looks for its accelerator when it is first imported, and warns where it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
