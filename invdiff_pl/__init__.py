"""InvDiff in PyTorch Lightning: find and mitigate unlabelled biases of diffusion models."""

__version__ = "0.1.0"
