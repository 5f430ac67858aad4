"""What the ranks of a job say to each other."""
