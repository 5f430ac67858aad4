"""The engine that is one or more rollout servers, with one module for each protocol that they speak."""
