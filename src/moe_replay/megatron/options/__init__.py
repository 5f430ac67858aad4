"""Megatron's own options, read from a recipe against the Megatron-Core that is installed."""
