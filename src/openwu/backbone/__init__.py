"""Base models, one file per family. A base model never knows that adapters exist."""
