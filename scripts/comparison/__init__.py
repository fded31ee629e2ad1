"""The comparison of TLoRA, its ablations and LoRA: see ``scripts/compare_methods.py``."""
