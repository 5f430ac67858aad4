"""What a Hugging Face checkpoint says of itself, read from its files without loading the model."""
