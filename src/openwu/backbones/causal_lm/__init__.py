"""Causal language models of transformers as frozen bases."""
