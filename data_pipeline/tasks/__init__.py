"""Synthetic tasks: examples that are made, not read, each a pure function of the seed and its number."""
