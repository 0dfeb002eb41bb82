"""Fabrics between peers: reaching each other, finding things, keeping state equal."""
