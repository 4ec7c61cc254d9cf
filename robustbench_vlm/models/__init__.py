"""Encoders: pixels in [0, 1] -> embeddings, zero-shot logits; checkpoints. Knows neither data nor attacks."""
