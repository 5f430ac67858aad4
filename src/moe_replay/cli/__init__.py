"""The command line, which alone reads the environment.

In: arguments. Out: exit codes.
"""
