"""Inputs of models that need more than token ids."""

import torch
from transformers import PretrainedConfig

from .family import BATCH, LENGTH, Inputs, text_inputs, token_ids
from .shrink import HIDDEN


def canvas_inputs(config: PretrainedConfig, padding: str | None = None) -> Inputs:
    """A prompt and the canvas of tokens that a diffusion model refines."""
    return text_inputs(config, padding) | {
        "decoder_input_ids": token_ids(length=config.canvas_length, seed=1)
    }


def embedding_inputs(config: PretrainedConfig, padding: str | None = None) -> Inputs:
    """Hidden states [B, S, H] of another model instead of token ids."""
    draw = torch.Generator().manual_seed(0)
    text = text_inputs(config, padding)
    text["talker_input_ids"] = text.pop("input_ids")
    return text | {"inputs_embeds": torch.randn((BATCH, LENGTH, HIDDEN), generator=draw)}


def vision_token_inputs(config: PretrainedConfig, padding: str | None = None) -> Inputs:
    """Tokens of which some are an image's."""
    text = text_inputs(config, padding)
    kinds = torch.zeros_like(text["input_ids"])
    kinds[0, 1:4] = 1
    kinds[1, 2:4] = 1
    return text | {"moe_mm_token_type_ids": kinds}


def patch_inputs(config: PretrainedConfig, padding: str | None = None) -> Inputs:
    """Two images of 4 x 4 and 2 x 4 patches, flattened."""
    draw = torch.Generator().manual_seed(0)
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])
    width = config.num_channels * config.patch_size**2
    patches = int(grids.prod(dim=1).sum())
    return {"pixel_values": torch.randn((patches, width), generator=draw), "grid_thw": grids}


def image_inputs(config: PretrainedConfig, padding: str | None = None) -> Inputs:
    """Images [B, C, H, W], each with the data set that decides its expert."""
    draw = torch.Generator().manual_seed(0)
    height = width = config.image_size
    pixels = torch.randn((BATCH, config.num_channels, height, width), generator=draw)
    return {"pixel_values": pixels, "dataset_index": torch.tensor([1, 2])}
