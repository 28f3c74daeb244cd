"""Evaluation: what a model does on photographs that no training saw, in numbers and pictures."""
