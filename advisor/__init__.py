"""mps-advisor: how many vLLM engines should share one NVIDIA GPU under CUDA MPS."""

__version__ = "0.1.0"
