"""Serving what clients send: shared objects, placement, trees of aggregators."""
