"""Rewards: a completion in, a Verdict out: numbers (math) and shape (format), standard library only."""
