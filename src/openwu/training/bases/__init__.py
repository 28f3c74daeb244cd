"""Generators for bases that come from elsewhere: pictures, notes of a language model."""
