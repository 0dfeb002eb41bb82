"""Transforms: what happens to a vector on its way.

`base.py` holds what they share: payloads that know their exact bytes, and how a transform learns
its layers. One file per method beside it; files with an underscore hold the bit-level pieces.
"""
