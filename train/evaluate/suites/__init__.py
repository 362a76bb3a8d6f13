"""Evaluation suites: what a model is asked beyond held-out losses, one file each (`base.Suite`)."""
