"""Rollouts on disk: written by any engine, and read again as one."""
