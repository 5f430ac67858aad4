"""What happens before the first step: whether a run can start, may start here, and how it is opened."""
