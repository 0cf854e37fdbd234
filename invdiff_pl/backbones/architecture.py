"""Sizes of a new pipeline."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of a new pipeline; the defaults train in minutes on two CPU cores.

    Attributes:
        resolution: side of the images in pixels.
        vae_channels: channels of each level of the autoencoder; each level but one halves the
            side.
        latent_channels: channels of the latents.
        unet_channels: channels of each level of the denoiser.
        attention_levels: how many of the denoiser's deepest levels attend to the text.
        heads: number of attention heads.
        text_width: width of the text encoder.
        family: ``sd`` for Stable Diffusion with v-prediction, or ``sana`` for a transformer with
            flow matching.
        transformer_width: channels of a transformer, which has no ``unet_channels``.
        transformer_layers: number of blocks of a transformer.
        patch_size: side of the square of latents that makes one token of a transformer.
    """

    resolution: int = 32
    vae_channels: tuple[int, ...] = (16, 32)
    latent_channels: int = 4
    unet_channels: tuple[int, ...] = (32, 64, 96)
    attention_levels: int = 1
    heads: int = 4
    text_width: int = 64
    family: str = "sd"
    transformer_width: int = 96
    transformer_layers: int = 6
    patch_size: int = 2

    @property
    def latent_side(self) -> int:
        """Side of the latents in pixels."""
        return self.resolution // 2 ** (len(self.vae_channels) - 1)


TINY = Architecture(
    vae_channels=(8, 8),
    unet_channels=(16, 16),
    attention_levels=1,
    heads=2,
    text_width=16,
    transformer_width=16,
    transformer_layers=2,
)
