"""From the adapters of other tools to the form of a run."""
