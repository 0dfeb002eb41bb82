"""What Byzantine peers send: blind corruption, and attacks that know every honest vector.

Every attack maps a `View` and a key to vectors, as `shoal.rounds.attack` says. `base.py` holds the
search for the most harmful strength against the rule in force.
"""
