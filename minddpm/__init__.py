"""Denoising diffusion from noise to CIFAR-10: the module that every chapter of the book imports."""

__version__ = "0.1.0"
