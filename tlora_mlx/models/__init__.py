"""Base models: finding and loading them, and their modules' names in MLX and Hugging Face."""
