"""The text of a scrape: what is in it, in which order, and how much of it."""
