"""The trainer of a plan: what a rank holds of the model, and what its passes take."""
