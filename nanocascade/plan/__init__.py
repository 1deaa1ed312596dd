"""What a run will hold and take: memory and time, before it starts."""
