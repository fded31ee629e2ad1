"""Options: one typed configuration per command makes its flags, reads its YAML, and validates."""
