"""Experiments that test the claims of functional memory, one file each.

`audit.py` defines the `Subject` that audit and manifold examine: any generator with any base. `embedded.py` is the one
inside the package. `runs.py` runs each experiment and writes its results; `geometry.py` compares adapters.
"""
