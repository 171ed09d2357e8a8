"""The rollout room: completions of a policy, with the log-probs of the distribution they were drawn from."""
