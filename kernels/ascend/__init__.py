"""Triton kernels for Ascend, and their lowering by Ascend's own compiler without an NPU."""
