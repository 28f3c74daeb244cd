"""Edits that are shown by pairs of pictures: the pairs, what is fitted to them, and the check of what came of it."""
