"""``gradiometer top``: the live page in a terminal, read from the run directories of this host without a server."""
