"""LoRA adapters: one type for all, a format for each tool that has them, proofs of writing."""
