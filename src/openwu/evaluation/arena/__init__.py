"""Blind pairwise votes (GSB: good, same, bad) by people in a browser, or by a comparing judge, and what they mean."""
