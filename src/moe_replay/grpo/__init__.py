"""The algorithm: recipe, advantages, loss, metrics, and the loop that reads like pseudocode."""
