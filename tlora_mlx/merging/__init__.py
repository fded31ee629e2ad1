"""Merging an adapter into a model's weights: dense, dequantized, or quantized again."""
