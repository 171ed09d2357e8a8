"""Evaluation arithmetic: from completions and verdicts to the numbers of a table."""
