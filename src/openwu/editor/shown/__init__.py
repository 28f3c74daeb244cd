"""Edits that pairs of pictures show: the pairs are read, solved for, refined on, and tried."""
