"""What `python -m launch calibrate` measures: single operations, steps of the trainer's engine, collectives."""
