"""Encoders: pixels in [0, 1] -> embeddings and zero-shot logits; checkpoints. Knows nothing of data or attacks."""
