"""Tensor arithmetic of adapters and of the generator's blocks. `dispatch` chooses the implementation."""
