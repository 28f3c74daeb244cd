"""Frozen bases in diffusers pipelines: what they share, and one file per base."""
