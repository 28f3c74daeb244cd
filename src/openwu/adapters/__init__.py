"""Adapters on a base model: `inject` applies them in a scope, `merge` adds them to weights, `export` stores them.

`linear`, `conv` and `experts` each know one kind of adapted module; `site` is what they share.
"""
