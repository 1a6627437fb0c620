"""Shared settings of the tests: one thread a process, so that ranks on few cores do not fight."""

import torch

torch.set_num_threads(1)
