"""Options: one typed configuration per command defines its flags, reads YAML, and validates."""
