"""What an edit costs on this machine, what limits it, and what would help: measured in about a minute, on one page."""
