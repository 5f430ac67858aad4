"""The command line: the only place that reads the environment.

In: arguments. Out: exit codes.
"""
