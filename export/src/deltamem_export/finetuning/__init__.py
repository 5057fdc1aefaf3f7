"""δ-mem trained on a Hugging Face decoder that stays frozen, from conversations in JSON Lines: docs/training.md."""
