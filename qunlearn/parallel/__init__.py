"""Several processes that train one adapter: each takes a share of a step's passes, and gradients are summed."""
