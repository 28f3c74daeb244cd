"""Kernels: attention, grouped products, norms, rotary embedding, low-rank updates; Triton beside plain torch."""
