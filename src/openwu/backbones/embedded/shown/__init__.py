"""Edits that are shown by pairs of pictures before and after: what is read of a pair, and what is fitted to it."""
