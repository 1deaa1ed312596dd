"""Rows of data files, the order they are drawn in, and packed batches of tensors."""
