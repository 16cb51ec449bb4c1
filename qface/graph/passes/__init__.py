"""The steps from captured to canonical layers; each takes a graph, changes it in place and keeps what it computes."""
