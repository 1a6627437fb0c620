"""Training of ultra-long-context Llama models on Megatron-Core."""

__version__ = "0.1.0"
