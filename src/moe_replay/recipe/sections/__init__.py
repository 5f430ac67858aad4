"""Every key of a recipe, written once: type, default, range, text and what else is true of it."""
