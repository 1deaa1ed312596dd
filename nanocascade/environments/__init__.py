"""What answers the tool calls of an episode: a shop, Python, a repository."""
