"""What editors share: checked requests, the base's passes over whole pictures or tiles, and refusals."""
