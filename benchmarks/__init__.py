"""Scripts that measure, and the dated results they wrote. Run them from the repository's root with `python -m`."""
