"""Reward functions, and the process that runs them."""
