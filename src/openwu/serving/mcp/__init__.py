"""Tools with which an agent edits photographs, over the Model Context Protocol.

files.py serves them over standard input and output, on the paths of this machine; remote.py over HTTP at `/mcp`, on
pictures that are uploaded. Both run on the queue and the engine of the service; calls.py has what they share;
notes.py has the tools of a language model's memory.
"""
