"""What a recipe needs of a machine, computed from its keys and the checkpoint's config.json."""
