"""Coded computing: exact results although some workers are late, lost or lie."""
