"""What is written down: digests, files that appear whole or not at all, tables in Markdown, where numbers come from."""
