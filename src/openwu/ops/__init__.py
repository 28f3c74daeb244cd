"""Tensor arithmetic of adapters. `dispatch` chooses the implementation; only `openwu.adapter` imports from here."""
