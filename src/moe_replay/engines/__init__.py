"""Where rollouts come from: the seam that every engine implements, and what engines share."""
