"""Small models, built from settings: `MLP`, `CNN`, `Transformer`."""
