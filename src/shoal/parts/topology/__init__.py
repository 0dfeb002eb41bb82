"""Graphs on peers with mixing weights; the contract is `shoal.world.topology.Topology`.

One graph per file; `base` holds what they share: from edges to weights, and the measures of a
mixing matrix.
"""
