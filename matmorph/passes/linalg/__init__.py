"""Tensors in, tensors out: decompositions that know nothing of graphs."""
