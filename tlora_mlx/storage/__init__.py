"""Files on disk: atomic writes, safetensors, and large files in blocks."""
