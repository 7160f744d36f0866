"""Clipping policies: what a user writes (spec), and the pure tensor code that it becomes (pipeline)."""
