"""The rollout room: completions sampled from a policy, with the log-probs of the distribution they were
sampled from.
"""
