"""Train and evaluate at a site: data, tasks, model, per-sample gradients, DP-SGD."""

import os

# The libraries read these when they are first imported, which no module of this package does before these lines.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait slow everything down on a machine that has other work to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
