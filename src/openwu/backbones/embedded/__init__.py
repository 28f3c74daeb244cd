"""The base model inside the package."""
