"""What a policy is trained on: prompts as token ids, and rewards for its completions."""
