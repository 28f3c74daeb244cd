"""Adding to a residual stream and normalising the sum, one file per implementation; `reference` defines the result."""
