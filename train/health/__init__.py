"""How the processes and machines of a run fare, beside what they compute."""
