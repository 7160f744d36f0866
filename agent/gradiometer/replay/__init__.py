"""What policies would have done: over the recorded norms of a run, and what to conclude from them."""
