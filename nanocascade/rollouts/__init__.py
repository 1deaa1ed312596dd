"""Episodes of the current policy: sampled, scored, grouped, filtered."""
