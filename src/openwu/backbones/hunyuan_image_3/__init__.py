"""HunyuanImage-3.0-Instruct, run through the code of the user's own folder: the base of the released generator."""
