"""Reward functions, and the process in which they run."""
