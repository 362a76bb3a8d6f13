"""Checkpoints that count only when they are whole and load under any layout."""
