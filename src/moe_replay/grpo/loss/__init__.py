"""The policy loss of a mini-batch: what is compared, how far it is trusted, and what it sums to."""
