"""How things are computed: which kernel attention runs on, products of many small matrices, norms, Triton or plain
torch, and on which device.
"""
