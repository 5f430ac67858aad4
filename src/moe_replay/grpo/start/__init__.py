"""What happens before the first step: whether a run can and may start, and how it is opened."""
