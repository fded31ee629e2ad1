"""LoRA adapters: one type for all, a format for each tool, and proofs of what was written."""
