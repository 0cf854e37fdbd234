"""The frozen backbone: loading it, noising latents and drawing samples."""
