"""Environments: what a model acts in over several turns, and the text in which it acts."""
