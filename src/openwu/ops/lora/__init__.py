"""The low-rank update `y + scale * B (A x)`, one file per implementation; `reference` defines the result."""
