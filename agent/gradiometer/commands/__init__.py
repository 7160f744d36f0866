"""Commands of the command line that are more than a few lines; each knows its own part of the package."""
