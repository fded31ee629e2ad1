"""Training: from options to a finished run, in which only B is trained."""
