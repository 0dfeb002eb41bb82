"""Small synthetic data sets in place of real ones: how they begin, are learned and are used."""
