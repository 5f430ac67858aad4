"""What a policy is trained on: prompts as token ids, and the rewards of what it answers."""
