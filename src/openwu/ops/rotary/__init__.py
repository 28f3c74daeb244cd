"""Turning the pairs of attention heads by angles, one file per implementation; `reference` defines the result."""
