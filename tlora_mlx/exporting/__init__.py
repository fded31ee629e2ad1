"""From a run directory to the formats that other tools read."""
