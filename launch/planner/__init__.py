"""`python -m launch plan`: what a run would take of GPUs that are not there yet, and how else it could be laid out."""
