"""Environments answer the tool calls of an episode: a shop, Python, a repository."""
