"""How the ranks of one job talk to one another.

In: values of this rank. Out: those of the others.
"""
