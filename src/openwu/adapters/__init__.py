"""Adapters on a base model: `inject` applies them in a scope, `merge` adds them to its parameters.

`operators` has one file for each kind of update; `site` is what adapted modules share; `active` holds the factors of a
scope; `scope` decides who may use it; `experts`, `stacked` and `augmented` apply LoRA to mixtures of experts; `updates`
compares adapters.
"""
