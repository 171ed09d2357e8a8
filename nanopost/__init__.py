"""The algorithms of LLM post-training: one function, one formula, one script each.

Nothing is imported here, so that `import nanopost.losses` costs torch and nothing else.
"""

__version__ = "0.1.0"
