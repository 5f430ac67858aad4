"""The engine that is a Hugging Face model in this process."""
