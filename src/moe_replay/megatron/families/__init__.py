"""Model families: the shape of each, and where each of its weights goes."""
