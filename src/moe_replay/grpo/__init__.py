"""The algorithm: recipe, advantages, loss, metrics, and the loop that reads like pseudocode.

In: a recipe. Out: a trained model and its records.
"""
