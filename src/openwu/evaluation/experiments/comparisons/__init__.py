"""Experiments that train several methods alike and compare what became of them."""
