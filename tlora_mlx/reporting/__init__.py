"""A run as one HTML page: no script, no external resource, light and dark."""
