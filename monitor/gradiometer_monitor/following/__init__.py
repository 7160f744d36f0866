"""The runs of this host: found, followed, told of when they begin and end, and removed when they are old."""
