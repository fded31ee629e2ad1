"""Data, the training loop and what it shows on the terminal."""
