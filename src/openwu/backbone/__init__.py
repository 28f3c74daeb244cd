"""Base models, one file per family. A base model never knows that adapters exist."""

BACKBONES: dict[str, str] = {"tiny": "openwu.backbone.tiny:TinyEditor"}
"""Name -> "module:Class". One line adds a base model."""
