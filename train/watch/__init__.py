"""Where each rank of a run is, which one does not move, and how each of them ended."""
