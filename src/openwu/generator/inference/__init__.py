"""The generator in inference: stages that are compiled or run in reduced precision."""
