"""The plan of a run: its memory and time, computed before it starts."""
