"""Scaling laws: from the losses of many runs to curves, optimal sizes and predictions (docs/scaling_laws.md)."""
