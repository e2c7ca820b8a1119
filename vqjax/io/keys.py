# SPDX-License-Identifier: Apache-2.0
"""Names: which checkpoint tensor becomes which parameter, from the model config alone.

The key names are those of CompVis/latent-diffusion (`openaimodel.UNetModel`, `model.Encoder`,
`model.Decoder`, commit a506df5), the paths are ours. Everything that reads a checkpoint walks this
table, so a model variant is described here once.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vqjax.config import AutoencoderConfig, LatentDiffusionConfig, UNetConfig

UNET_PREFIX = "model.diffusion_model."
FIRST_STAGE_PREFIX = "first_stage_model."
CLASS_KEY = "cond_stage_model.embedding.weight"

# Axis order of our array in terms of the checkpoint's axes, after dropping a window axis of one.
_PERMUTATION = {"conv": (2, 3, 1, 0), "conv1d": (1, 0), "linear": (1, 0), "plain": None}


@dataclasses.dataclass(frozen=True)
class KeyEntry:
    """One tensor of the model.

    Attributes:
      key: name in an LDM state dict.
      path: name in our params tree, joined by "/".
      shape: shape in the checkpoint: convolutions [O, I, kH, kW], linear layers [O, I].
      layout: "conv", "conv1d" (a 1x1 convolution over tokens, stored [O, I, 1]), "linear" or
        "plain" (vectors and embeddings, the same on both sides).
    """

    key: str
    path: str
    shape: tuple[int, ...]
    layout: str

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Shape in our tree: convolutions [kH, kW, I, O], linear layers [I, O]."""
        order = _PERMUTATION[self.layout]
        return self.shape if order is None else tuple(self.shape[axis] for axis in order)

    @property
    def ema_key(self) -> str | None:
        """Name of the averaged copy, or None outside the U-Net. The original deletes every dot."""
        if not self.key.startswith(UNET_PREFIX):
            return None
        return "model_ema." + self.key.removeprefix("model.").replace(".", "")

    def to_param(self, array: np.ndarray) -> np.ndarray:
        """Checkpoint layout to ours, as a contiguous array."""
        order = _PERMUTATION[self.layout]
        if order is None:
            return np.ascontiguousarray(array).reshape(array.shape)
        if self.layout == "conv1d":
            array = array[:, :, 0]
        return np.ascontiguousarray(array.transpose(order))


def table(config: LatentDiffusionConfig) -> list[KeyEntry]:
    """Every tensor of the model `config` describes, each key and each path once.

    Buffers that are not weights (the noise schedule, averaging counters) are not part of it.
    """
    entries = [*unet_entries(config.unet), *first_stage_entries(config.first_stage)]
    if config.n_classes:
        shape = (config.n_classes, config.unet.context_dim or 0)
        entries.append(KeyEntry(CLASS_KEY, "cond_stage/embedding", shape, "plain"))
    return entries


def _conv(key: str, path: str, inputs: int, outputs: int, window: int = 3) -> Iterator[KeyEntry]:
    yield KeyEntry(f"{key}.weight", f"{path}/kernel", (outputs, inputs, window, window), "conv")
    yield KeyEntry(f"{key}.bias", f"{path}/bias", (outputs,), "plain")


def _conv1d(key: str, path: str, inputs: int, outputs: int) -> Iterator[KeyEntry]:
    yield KeyEntry(f"{key}.weight", f"{path}/kernel", (outputs, inputs, 1), "conv1d")
    yield KeyEntry(f"{key}.bias", f"{path}/bias", (outputs,), "plain")


def _linear(
    key: str, path: str, inputs: int, outputs: int, *, bias: bool = True
) -> Iterator[KeyEntry]:
    yield KeyEntry(f"{key}.weight", f"{path}/kernel", (outputs, inputs), "linear")
    if bias:
        yield KeyEntry(f"{key}.bias", f"{path}/bias", (outputs,), "plain")


def _norm(key: str, path: str, channels: int) -> Iterator[KeyEntry]:
    yield KeyEntry(f"{key}.weight", f"{path}/scale", (channels,), "plain")
    yield KeyEntry(f"{key}.bias", f"{path}/bias", (channels,), "plain")


def unet_entries(config: UNetConfig) -> list[KeyEntry]:
    """The noise-prediction network, paths under "unet/"."""
    entries = list(_unet(config))
    return [
        dataclasses.replace(entry, key=UNET_PREFIX + entry.key, path=f"unet/{entry.path}")
        for entry in entries
    ]


def _unet(config: UNetConfig) -> Iterator[KeyEntry]:
    width, time = config.model_channels, 4 * config.model_channels
    yield from _linear("time_embed.0", "time_embed/dense1", width, time)
    yield from _linear("time_embed.2", "time_embed/dense2", time, time)
    yield from _conv("input_blocks.0.0", "input_blocks_0/conv", config.in_channels, width)

    channels, skips, factor, index = width, [width], 1, 1
    for level, multiple in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            key, path = f"input_blocks.{index}", f"input_blocks_{index}"
            yield from _res_block(config, f"{key}.0", f"{path}/res", channels, multiple * width)
            channels = multiple * width
            if factor in config.attention_resolutions:
                yield from _attention(config, f"{key}.1", f"{path}/attn", channels)
            skips.append(channels)
            index += 1
        if level < len(config.channel_mult) - 1:
            key, path = f"input_blocks.{index}.0", f"input_blocks_{index}/downsample"
            yield from _resample(config, key, path, channels, conv="op")
            skips.append(channels)
            index, factor = index + 1, factor * 2

    yield from _res_block(config, "middle_block.0", "middle_block/res1", channels, channels)
    yield from _attention(config, "middle_block.1", "middle_block/attn", channels)
    yield from _res_block(config, "middle_block.2", "middle_block/res2", channels, channels)

    index = 0
    for level, multiple in reversed(list(enumerate(config.channel_mult))):
        for block in range(config.num_res_blocks + 1):
            key, path, part = f"output_blocks.{index}", f"output_blocks_{index}", 1
            inputs, channels = channels + skips.pop(), multiple * width
            yield from _res_block(config, f"{key}.0", f"{path}/res", inputs, channels)
            if factor in config.attention_resolutions:
                yield from _attention(config, f"{key}.1", f"{path}/attn", channels)
                part = 2
            if level and block == config.num_res_blocks:
                # The position of the upsampling part depends on whether attention comes before it.
                yield from _resample(
                    config, f"{key}.{part}", f"{path}/upsample", channels, conv="conv"
                )
                factor //= 2
            index += 1

    yield from _norm("out.0", "out/norm", channels)
    yield from _conv("out.2", "out/conv", channels, config.out_channels)


def _res_block(
    config: UNetConfig, key: str, path: str, inputs: int, outputs: int
) -> Iterator[KeyEntry]:
    emb = 2 * outputs if config.use_scale_shift_norm else outputs
    yield from _norm(f"{key}.in_layers.0", f"{path}/norm1", inputs)
    yield from _conv(f"{key}.in_layers.2", f"{path}/conv1", inputs, outputs)
    yield from _linear(f"{key}.emb_layers.1", f"{path}/emb", 4 * config.model_channels, emb)
    yield from _norm(f"{key}.out_layers.0", f"{path}/norm2", outputs)
    yield from _conv(f"{key}.out_layers.3", f"{path}/conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{key}.skip_connection", f"{path}/skip", inputs, outputs, window=1)


def _resample(
    config: UNetConfig, key: str, path: str, channels: int, *, conv: str
) -> Iterator[KeyEntry]:
    if config.resblock_updown:
        yield from _res_block(config, key, path, channels, channels)
    else:
        yield from _conv(f"{key}.{conv}", path, channels, channels)


def _attention(config: UNetConfig, key: str, path: str, channels: int) -> Iterator[KeyEntry]:
    yield from _norm(f"{key}.norm", f"{path}/norm", channels)
    if config.context_dim is None:
        yield from _conv1d(f"{key}.qkv", f"{path}/qkv", channels, 3 * channels)
        yield from _conv1d(f"{key}.proj_out", f"{path}/proj_out", channels, channels)
        return
    yield from _conv(f"{key}.proj_in", f"{path}/proj_in", channels, channels, window=1)
    for depth in range(config.transformer_depth):
        block = f"{key}.transformer_blocks.{depth}"
        yield from _transformer_block(block, f"{path}/block_{depth}", channels, config.context_dim)
    yield from _conv(f"{key}.proj_out", f"{path}/proj_out", channels, channels, window=1)


def _transformer_block(key: str, path: str, channels: int, context: int) -> Iterator[KeyEntry]:
    for name, source in (("attn1", channels), ("attn2", context)):
        for part, inputs in (("to_q", channels), ("to_k", source), ("to_v", source)):
            target = f"{path}/{name}/{part}"
            yield from _linear(f"{key}.{name}.{part}", target, inputs, channels, bias=False)
        yield from _linear(f"{key}.{name}.to_out.0", f"{path}/{name}/to_out", channels, channels)
    yield from _linear(f"{key}.ff.net.0.proj", f"{path}/ff/proj", channels, 8 * channels)
    yield from _linear(f"{key}.ff.net.2", f"{path}/ff/out", 4 * channels, channels)
    for name in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{key}.{name}", f"{path}/{name}", channels)


def first_stage_entries(config: AutoencoderConfig) -> list[KeyEntry]:
    """The autoencoder, paths under "first_stage/"."""
    moments = 1 if config.kind == "vq" else 2  # "kl" predicts a mean and a variance
    entries = [
        *_encoder(config, moments * config.z_channels),
        *_decoder(config),
        *_conv(
            "quant_conv",
            "quant_conv",
            moments * config.z_channels,
            moments * config.embed_dim,
            window=1,
        ),
        *_conv("post_quant_conv", "post_quant_conv", config.embed_dim, config.z_channels, window=1),
    ]
    if config.kind == "vq":
        shape = (config.n_embed, config.embed_dim)
        entries.append(
            KeyEntry("quantize.embedding.weight", "quantize/embedding", shape, "plain"),
        )
    return [
        dataclasses.replace(
            entry, key=FIRST_STAGE_PREFIX + entry.key, path=f"first_stage/{entry.path}"
        )
        for entry in entries
    ]


def _encoder(config: AutoencoderConfig, outputs: int) -> Iterator[KeyEntry]:
    yield from _conv("encoder.conv_in", "encoder/conv_in", config.in_channels, config.ch)
    channels, resolution = config.ch, config.resolution
    for level, multiple in enumerate(config.ch_mult):
        key, path = f"encoder.down.{level}", f"encoder/down_{level}"
        for block in range(config.num_res_blocks):
            yield from _stage_block(config, key, path, block, channels, multiple, resolution)
            channels = multiple * config.ch
        if level < len(config.ch_mult) - 1:
            yield from _conv(f"{key}.downsample.conv", f"{path}/downsample", channels, channels)
            resolution //= 2
    yield from _first_stage_middle("encoder", channels)
    yield from _norm("encoder.norm_out", "encoder/norm_out", channels)
    yield from _conv("encoder.conv_out", "encoder/conv_out", channels, outputs)


def _decoder(config: AutoencoderConfig) -> Iterator[KeyEntry]:
    channels = config.ch * config.ch_mult[-1]
    resolution = config.resolution // config.downsampling
    yield from _conv("decoder.conv_in", "decoder/conv_in", config.z_channels, channels)
    yield from _first_stage_middle("decoder", channels)
    for level, multiple in reversed(list(enumerate(config.ch_mult))):
        key, path = f"decoder.up.{level}", f"decoder/up_{level}"
        for block in range(config.num_res_blocks + 1):
            yield from _stage_block(config, key, path, block, channels, multiple, resolution)
            channels = multiple * config.ch
        if level:
            yield from _conv(f"{key}.upsample.conv", f"{path}/upsample", channels, channels)
            resolution *= 2
    yield from _norm("decoder.norm_out", "decoder/norm_out", channels)
    yield from _conv("decoder.conv_out", "decoder/conv_out", channels, config.out_channels)


def _stage_block(
    config: AutoencoderConfig,
    key: str,
    path: str,
    block: int,
    inputs: int,
    multiple: int,
    resolution: int,
) -> Iterator[KeyEntry]:
    outputs = multiple * config.ch
    yield from _plain_block(f"{key}.block.{block}", f"{path}/block_{block}", inputs, outputs)
    if resolution in config.attn_resolutions:
        yield from _image_attention(f"{key}.attn.{block}", f"{path}/attn_{block}", outputs)


def _first_stage_middle(side: str, channels: int) -> Iterator[KeyEntry]:
    # Attention in the middle is there whatever attn_resolutions says.
    yield from _plain_block(f"{side}.mid.block_1", f"{side}/mid/block_1", channels, channels)
    yield from _image_attention(f"{side}.mid.attn_1", f"{side}/mid/attn_1", channels)
    yield from _plain_block(f"{side}.mid.block_2", f"{side}/mid/block_2", channels, channels)


def _plain_block(key: str, path: str, inputs: int, outputs: int) -> Iterator[KeyEntry]:
    yield from _norm(f"{key}.norm1", f"{path}/norm1", inputs)
    yield from _conv(f"{key}.conv1", f"{path}/conv1", inputs, outputs)
    yield from _norm(f"{key}.norm2", f"{path}/norm2", outputs)
    yield from _conv(f"{key}.conv2", f"{path}/conv2", outputs, outputs)
    if inputs != outputs:
        yield from _conv(f"{key}.nin_shortcut", f"{path}/skip", inputs, outputs, window=1)


def _image_attention(key: str, path: str, channels: int) -> Iterator[KeyEntry]:
    yield from _norm(f"{key}.norm", f"{path}/norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{key}.{part}", f"{path}/{part}", channels, channels, window=1)
