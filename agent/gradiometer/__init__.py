"""gradiometer: an instrument that measures gradients."""
