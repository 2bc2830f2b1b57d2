"""SD3.5 in plain torch: the network, its guidance, its samplers and its files, with no host."""
