"""Training: batch -> loss -> update, resumable at any step to the same weights."""
