"""Exporting as configured, model cards, and the Hugging Face Hub."""
