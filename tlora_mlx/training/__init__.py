"""Training: from options to a finished run, B alone trained."""
