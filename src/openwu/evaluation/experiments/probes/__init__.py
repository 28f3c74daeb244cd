"""Experiments that look at a model that is there, or at its first steps."""
