"""Flow matching: paths, exact flows, partitions of data, ensembles, samplers and distances."""
