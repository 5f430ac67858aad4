"""The guard inside a run: what replaying passes saw, and what a step does about it."""
