"""Collective operations of groups that change, and training on top of them."""
