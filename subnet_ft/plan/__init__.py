"""What a training step takes in memory, by tracing the real code without weights or a GPU."""
