"""Training in pipelines: stages of one model that pass on activations and gradients."""
