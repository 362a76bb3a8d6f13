"""The language models: configuration, modules, initialisation, accounting, weights on disk, generation."""
