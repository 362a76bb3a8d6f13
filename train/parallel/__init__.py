"""How a run is laid out over processes: mesh, engines, and the parts of parameters that a rank holds."""
