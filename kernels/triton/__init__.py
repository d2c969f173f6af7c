"""Triton kernels, in the language that Triton 3.2 and later share.

Functions here take tensors and numbers, launch, and return tensors. Files named `*_tile.py` hold functions over
tiles that kernels of more than one device are made of.
"""
