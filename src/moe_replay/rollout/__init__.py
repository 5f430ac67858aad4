"""Rollouts: the engine seam, the engines, prompts and rewards.

In: prompts. Out: completions with routes, and their rewards. Called by: grpo.
"""
