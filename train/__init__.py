"""The run: configuration, plan, DeepSpeed engine, training loop, checkpoints, callbacks, evaluation."""
