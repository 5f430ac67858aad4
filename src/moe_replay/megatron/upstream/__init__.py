"""What Megatron-Core misses on this machine, and how its versions differ."""
