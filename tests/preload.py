"""What the server imports once, so that the processes it forks start in milliseconds: see tests/processes.py.

Imported in the server alone. Nothing here may start a thread, use CUDA or join a process group.
"""

import gc
import importlib
import multiprocessing.forkserver
import os
import pkgutil

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a forked process cannot use CUDA; tests of GPUs start their own

import torch

import megatron_ultralong

torch.set_num_threads(1)

LIBRARIES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "psutil",
    "pytest",
    "tests.spawn",
    "tests.tiny",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)

for name in (
    *LIBRARIES,
    *(module.name for module in pkgutil.walk_packages(megatron_ultralong.__path__, "megatron_ultralong.")),
):
    try:
        importlib.import_module(name)
    except ImportError:  # an optional one, or one that needs a GPU: its users report that it is missing
        continue

# Processes that the forked ones start are forked from here too.
multiprocessing.forkserver._forkserver.ensure_running = lambda: None

gc.freeze()  # these objects stay, and need not be searched for garbage in every process
