"""`python -m launch reproduce`: published comparisons of architectures, done again in small."""
