"""Functional memory: the path from a context to answers under its adapter, through a frozen language model."""
