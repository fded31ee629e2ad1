"""The run directory: its files, its lock, its checkpoints, and who writes them."""
