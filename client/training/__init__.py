"""Train and evaluate at a site: data, tasks, model, per-sample gradients, DP-SGD."""

import os

# The libraries read these variables when they are first imported. No module of this package imports them earlier.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait slow down the other processes of the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
