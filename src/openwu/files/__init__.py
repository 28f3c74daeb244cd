"""Files: digests, atomic writes, safetensors headers, Markdown tables, and provenance of results."""
