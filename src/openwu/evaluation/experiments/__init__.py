"""Experiments that test the claims of functional memory, one file each.

`audit.py` defines the `Subject` that audit and manifold examine: any generator with any base. `runs.py` runs
each experiment on the embedded model and writes its results; `geometry.py` compares adapters.
"""
