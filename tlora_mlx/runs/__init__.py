"""The run directory: its files, its lock, its checkpoints, and the writer of them all."""
