"""Examples: vision transformers on handwritten digits."""
