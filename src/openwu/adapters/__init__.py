"""Adapters on a base model: `inject` applies them in a scope, `merge` adds them to its parameters.

`operators` has one file for each kind of update; `site` is what the adapted modules share; `scope` decides who may use
an applied adapter; `experts`, `stacked` and `augmented` apply LoRA to mixtures of experts; `updates` compares adapters.
"""
