"""Training and test data: the edit suite, the sentences that ask for each edit, photographs, and batches of pairs."""
