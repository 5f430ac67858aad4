"""The command line, which alone reads the environment."""
