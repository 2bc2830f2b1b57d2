"""MMDiT-X and its ControlNets, as tensors in and tensors out."""
