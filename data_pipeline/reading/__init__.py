"""Batches of samples in the order of a run, from a corpus or from text that is tokenized while it is read."""
