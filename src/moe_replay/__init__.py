"""GRPO for mixture-of-experts models, trained through the experts that the rollout used."""

__version__ = "0.1.0"
