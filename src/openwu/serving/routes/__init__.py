"""The routes that edit pictures and generate adapters, and how their results become answers and event streams."""
