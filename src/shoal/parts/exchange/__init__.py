"""Who hears whom in a round, as data; the contract is `shoal.rounds.exchange.Exchange`."""
