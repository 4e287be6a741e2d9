"""Look into the trained functions of finished runs: attention maps, loss landscapes, gradients (``bench inspect``)."""
