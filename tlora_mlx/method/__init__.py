"""The TLoRA method: arrays and modules in, arrays out; no files, no printing, no global state."""
