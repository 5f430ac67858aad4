"""The recipe: every option of a run, typed, checked and loaded before anything heavy is."""
