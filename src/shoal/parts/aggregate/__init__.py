"""Rules that make one vector of several: plain and robust means, selections and medians.

Every rule takes `(x [..., k, dim], mask=, weight=, center=)` as `shoal.rounds.aggregator` says;
`base.py` states what rules may offer beyond that.
"""
