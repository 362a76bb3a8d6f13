"""Callbacks of the training run, one concern each."""
