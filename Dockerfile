# syntax=docker/dockerfile:1
# megatron_ultralong on NVIDIA's PyTorch container, which brings torch, TransformerEngine and apex built for its CUDA.
#   docker build -t megatron-ultralong .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v /data:/data -it megatron-ultralong
# Another base, by tag or, so that a later build has the same, by digest (`docker buildx imagetools inspect` prints it):
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch@sha256:DIGEST -t megatron-ultralong .
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}

# Versions of the packages that the container does not bring; --build-arg PINS= installs the newest that setup.py allows.
ARG PINS=constraints.txt
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/megatron_ultralong

# Dependencies before code, from an empty package: only a change of these four files installs them again.
COPY setup.py pyproject.toml constraints.txt docker/constraints.py ./
RUN mkdir megatron_ultralong && echo '__version__ = "0"' > megatron_ultralong/__init__.py && touch README.md \
 && python constraints.py ${PINS} > /tmp/constraints.txt \
 && pip install -c /tmp/constraints.txt . && pip uninstall -y megatron_ultralong \
 && rm -r megatron_ultralong README.md constraints.py build ./*.egg-info

COPY . .
RUN pip install --no-deps --no-build-isolation -e . \
 && python -c "import transformer_engine, torch; print('torch', torch.__version__, 'transformer_engine', transformer_engine.__version__)"

# Runs as an ordinary user, `trainer`; mount data and runs with its ids, or pass --user.
RUN useradd --create-home --uid 10001 trainer && mkdir -p /data runs && chown trainer /data runs
USER 10001
CMD ["bash"]
