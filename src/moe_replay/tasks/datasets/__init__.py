"""Prompts from data files: found, read, cached, and turned into rows."""
