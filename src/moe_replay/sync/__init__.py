"""From the trainer to everybody else: weights to the engine, small messages between ranks.

In: an actor. Out: pushed weights, gathered records. Called by: grpo.loop.
"""
