"""Edits of the embedded base: jobs share passes of the network, and passes run in pieces on threads of their own."""
