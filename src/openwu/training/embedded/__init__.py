"""The embedded model: made from nothing, from pairs of one's own, or with new sentences."""
