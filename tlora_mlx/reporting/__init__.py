"""Showing a run: one HTML page (no script, no external resource), pictures and tables."""
