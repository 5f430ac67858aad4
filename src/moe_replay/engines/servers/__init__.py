"""The engine that is one or more rollout servers, with a module for each of their protocols."""
