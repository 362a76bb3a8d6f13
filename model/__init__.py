"""The language models: configuration, modules, initialisation, accounting, weights on disk, generation."""

from model.kernels_package import use_own_kernels

use_own_kernels()
