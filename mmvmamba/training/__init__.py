"""What a training run needs around the model: hooks, strategies, and what the process is set up with."""
