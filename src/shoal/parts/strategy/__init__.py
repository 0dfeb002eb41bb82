"""Strategies that several systems use."""
