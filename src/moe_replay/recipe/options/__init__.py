"""Megatron's own options in a recipe: what they may not say, told without loading Megatron."""
