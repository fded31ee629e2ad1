"""An adapter in a model's weights: dense, dequantized, or quantized again."""
