"""Traces as bytes: one format on the wire and on disk."""
