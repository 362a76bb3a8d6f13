"""From a configuration to processes: on this machine today, on a Slurm cluster in a later release."""
