"""From a configuration to processes, on this machine today, and from many runs to scaling laws."""
