# syntax=docker/dockerfile:1
# megatron_ultralong on NVIDIA's PyTorch container, which brings torch, TransformerEngine and apex built for its CUDA.
#   docker build -t megatron-ultralong .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -it megatron-ultralong
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/megatron_ultralong

# Packages of the container are recorded first and pinned during the install, so that nothing replaces them.
RUN python - <<'PYTHON' > /tmp/container.txt
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "transformer-engine", "apex", "triton", "flash-attn", "numpy"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
PYTHON

# Dependencies before code: a change of the code alone rebuilds only the last layers.
COPY setup.py pyproject.toml README.md ./
COPY megatron_ultralong/__init__.py megatron_ultralong/
RUN pip install -c /tmp/container.txt . && pip uninstall -y megatron_ultralong && rm -rf build *.egg-info

COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
 && python -c "import transformer_engine, torch; print('torch', torch.__version__, 'transformer_engine', transformer_engine.__version__)"

# Runs as an ordinary user; mount data and runs with its ids, or pass --user.
RUN useradd --create-home --uid 10001 trainer && mkdir -p /data runs && chown trainer /data runs
USER trainer
CMD ["bash"]
