"""vLLM in this process or under the rollout server, with routes recorded and weights pushed."""
