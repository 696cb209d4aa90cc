"""The training loop: the only place where everything meets."""
