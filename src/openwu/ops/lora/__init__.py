"""The low-rank update `y + scale * B (A x)`, one file per implementation; `reference` is the one that defines the result."""
