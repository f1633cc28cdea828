"""Train and evaluate at a site: data, tasks, model, per-sample gradients, DP-SGD."""
