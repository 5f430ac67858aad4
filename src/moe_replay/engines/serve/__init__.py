"""The rollout server: an engine behind HTTP, and the protocol that it speaks."""
