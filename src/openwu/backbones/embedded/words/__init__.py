"""What the words of an instruction ask for: rules beside the encoder, for wishes, complaints, numbers and languages."""
