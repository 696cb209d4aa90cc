"""The training loop and its hooks: start, steps, evaluation, checkpoints, logs."""
