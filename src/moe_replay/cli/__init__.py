"""The command line: the only place that reads the environment.

In: arguments. Out: exit codes. Called by: the `moe-replay` command and torchrun.
"""
