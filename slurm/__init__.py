"""Templates of batch scripts and the check of nodes, for `python -m launch submit` to put into a run's folder."""
