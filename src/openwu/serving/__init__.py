"""The HTTP service: OpenAI's image edits API over one frozen base, with an adapter of its own for every request.

A request travels: middleware.py (limits) -> routes/ -> requests/ (checked fields) -> queue.py (fair order, admission)
-> engines/ (worker processes that hold an Editor) -> back through routes/ as JSON or server-sent events.
"""
