"""Adapters on a base model: `inject` applies them inside a scope, `merge` adds them to the weights, `export` reads and writes folders.

`linear`, `conv` and `experts` each know one kind of adapted module; `site` is what they share.
"""
