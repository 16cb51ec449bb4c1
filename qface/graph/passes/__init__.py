"""Passes of ``canonicalize``; each changes a graph in place without changing its outputs."""
