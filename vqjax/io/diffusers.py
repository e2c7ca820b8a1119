# SPDX-License-Identifier: Apache-2.0
"""The same models in the folder layout of the diffusers library.

A folder holds `unet/` and `vqvae/` or `vae/`, each with `config.json` and
`diffusion_pytorch_model.safetensors` or `.bin`. Diffusers names blocks by level instead of by
index, and splits the fused attention projection; both follow from our paths. Names as the library's
own conversion scripts write them (`convert_ldm_original_checkpoint_to_diffusers.py`,
`single_file_utils.py`), older attention names included.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vqjax.config import PRESETS, AutoencoderConfig, LatentDiffusionConfig, UNetConfig, misfits
from vqjax.core.model import Model
from vqjax.errors import VqjaxError, gathered
from vqjax.io import keys, ldm, safetensors_reader, torch_pickle
from vqjax.io.lazy import LazyTensor

_FIRST_STAGE_FOLDERS = ("vqvae", "vae", "first_stage")
_CLASS_FOLDERS = ("class_embedder", "cond_stage", "cond_stage_model")
_CLASS_NAMES = ("embedding.weight", "weight")
_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_CLASS_FILES = (*_FILES, "model.safetensors", "pytorch_model.bin")

# Attention projections were renamed in diffusers 0.15; checkpoints of both kinds are around.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_RES = {"emb": "time_emb_proj", "skip": "conv_shortcut"}
_TRANSFORMER = {"to_out": "to_out.0", "proj": "net.0.proj", "out": "net.2"}
_IMAGE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_UNET_TOP = {
    "time_embed/dense1": "time_embedding.linear_1",
    "time_embed/dense2": "time_embedding.linear_2",
    "input_blocks_0/conv": "conv_in",
    "out/norm": "conv_norm_out",
    "out/conv": "conv_out",
}
_MIDDLE = {"res1": "resnets.0", "attn": "attentions.0", "res2": "resnets.1"}
_STAGE_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


class _Field(NamedTuple):
    """A field of the library's JSON that changes what the same tensors compute.

    Attributes:
      absent: what the library takes where the file does not say.
      accepted: what our models compute.
    """

    absent: Any
    accepted: tuple[Any, ...]


def _fixed(value: Any, *same: Any) -> _Field:
    """The library's default is what our models compute; so are other names of it."""
    return _Field(value, (value, *same))


# Defaults of UNet2DModel and UNet2DConditionModel, VQModel and AutoencoderKL, DDIMScheduler and
# DDPMScheduler. What adds, renames or reshapes tensors is not listed: they are compared themselves.
_REQUIRED = {
    "unet": {
        "act_fn": _fixed("silu", "swish"),
        "attn_norm_num_groups": _fixed(None, 32),
        "center_input_sample": _fixed(False),
        "class_embed_type": _fixed(None),
        "downsample_padding": _fixed(1),
        "downsample_type": _fixed("conv", "resnet"),
        "dual_cross_attention": _fixed(False),
        "flip_sin_to_cos": _fixed(True),
        "freq_shift": _fixed(0),
        "mid_block_scale_factor": _fixed(1),
        "norm_eps": _fixed(1e-5),
        "norm_num_groups": _fixed(32),
        "only_cross_attention": _fixed(False),
        "resnet_out_scale_factor": _fixed(1),
        "resnet_skip_time_act": _fixed(False),
        "resnet_time_scale_shift": _fixed("default", "scale_shift"),
        "time_embedding_act_fn": _fixed(None),
        "time_embedding_type": _fixed("positional"),
        "timestep_post_act": _fixed(None),
        "upsample_type": _fixed("conv", "resnet"),
    },
    "first_stage": {
        "act_fn": _fixed("silu", "swish"),
        "latents_mean": _fixed(None),
        "latents_std": _fixed(None),
        "norm_num_groups": _fixed(32),
        "norm_type": _fixed("group"),
        "shift_factor": _fixed(None, 0),
    },
    "scheduler": {
        "beta_schedule": _Field("linear", ("scaled_linear",)),
        "predict_epsilon": _fixed(True),  # what prediction_type was before diffusers 0.10
        "prediction_type": _fixed("epsilon"),
        "rescale_betas_zero_snr": _fixed(False),
        "trained_betas": _fixed(None),
    },
}
_BETA_START, _BETA_END = 0.0001, 0.02  # of a scheduler whose file does not say


def load_folder(path: pathlib.Path, config: LatentDiffusionConfig | None) -> Model:
    """Loads a diffusers folder.

    Args:
      config: None reads it from the folder's own JSON files.

    Raises:
      VqjaxError: if parts are missing or do not make the model.
    """
    unet = _open(path / "unet", _FILES)
    stage_folder = _first_present(path, _FIRST_STAGE_FOLDERS)
    if not unet or stage_folder is None:
        raise VqjaxError(
            f"{path}: neither a run folder (run.json, model/) nor a diffusers folder: that has "
            f"unet/ and {' or '.join(f'{name}/' for name in _FIRST_STAGE_FOLDERS[:2])}, each with "
            f"{' or '.join(_FILES)}"
        )
    stage = _open(stage_folder, _FILES)
    classes = _class_embedding(path, unet)
    config = config or read_config(path, stage_folder, classes)
    if config.unet.context_dim and classes is None:
        raise VqjaxError(
            f"{path}: a class-conditional model needs its class embedding: put a tensor "
            f"'embedding.weight' [{config.n_classes or 'classes'}, {config.unet.context_dim}] into "
            f"{_CLASS_FOLDERS[0]}/{_CLASS_FILES[0]}"
        )
    files = {"unet": unet, "first_stage": stage}
    tensors, names, used = {}, {}, set()
    for entry in keys.table(config):
        part, _, rest = entry.path.partition("/")
        if part == "cond_stage":
            if classes is not None:
                tensors[entry.key] = classes
            continue
        sources = _sources(entry, part, rest, config)
        found = [_find(files[part], source) for source in sources]
        used |= {(part, name) for name in found}
        names[entry.key] = f"{part}: {' + '.join(found)}"
        if all(name in files[part] for name in found):
            parts = [files[part][name] for name in found]
            tensors[entry.key] = _adapt(entry, parts, config.unet)
    for part, file in files.items():
        extras = [name for name in file if (part, name) not in used]
        tensors |= {f"{part}: {name}": file[name] for name in extras}
    return ldm.build_model(tensors, config, where=str(path), names=names)


def _open(folder: pathlib.Path, files: tuple[str, ...]) -> dict[str, LazyTensor]:
    for name in files:
        path = folder / name
        if path.exists():
            torch = path.suffix == ".bin"
            opener = torch_pickle.load_tensors if torch else safetensors_reader.open_tensors
            return opener(path)
    return {}


def _first_present(path: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _class_embedding(path: pathlib.Path, unet: dict[str, LazyTensor]) -> LazyTensor | None:
    """The class embedding, from a folder of its own or from among the U-Net's tensors."""
    inside = unet.pop("class_embedder.embedding.weight", None)
    folder = _first_present(path, _CLASS_FOLDERS)
    file = {} if folder is None else _open(folder, _CLASS_FILES)
    return next((file[name] for name in _CLASS_NAMES if name in file), inside)


def _find(file: Mapping[str, LazyTensor], name: str) -> str:
    """The name under which the file has the tensor: as it is today, or as it was."""
    if name in file:
        return name
    for new, old in _OLD_NAMES.items():
        renamed = name.replace(f".{new}.", f".{old}.")
        if renamed != name and renamed in file:
            return renamed
    return name


def _sources(
    entry: keys.KeyEntry, part: str, rest: str, config: LatentDiffusionConfig
) -> list[str]:
    """Names in diffusers of what makes this entry: one, or three for a fused projection."""
    module, _, leaf = rest.rpartition("/")
    leaf = "bias" if leaf == "bias" else "weight"
    if part == "first_stage":
        return [f"{_stage_name(module, rest, config.first_stage)}.{leaf}"]
    if module.endswith("/qkv"):
        name = _unet_name(module.removesuffix("/qkv"), config.unet)
        return [f"{name}.{projection}.{leaf}" for projection in ("to_q", "to_k", "to_v")]
    return [f"{_unet_name(module, config.unet)}.{leaf}"]


def _unet_name(module: str, config: UNetConfig) -> str:
    if module in _UNET_TOP:
        return _UNET_TOP[module]
    block, kind, *rest = module.split("/")
    layers = config.num_res_blocks + 1
    if block == "middle_block":
        where = f"mid_block.{_MIDDLE[kind]}"
    else:
        side, index = re.fullmatch(r"(input|output)_blocks_(\d+)", block).groups()  # type: ignore[union-attr]
        index = int(index) - (side == "input")  # input block 0 is the first convolution
        where = f"{'down' if side == 'input' else 'up'}_blocks.{index // layers}"
        suffix = {"res": f"resnets.{index % layers}", "attn": f"attentions.{index % layers}"}
        where += f".{suffix.get(kind, f'{kind}rs.0')}"
    if kind in ("downsample", "upsample") and not rest:
        rest = ["conv"]
    if kind == "attn":
        return ".".join([where, *_attention_names(rest, config)])
    return ".".join([where, *(_RES.get(name, name) for name in rest)])


def _attention_names(rest: list[str], config: UNetConfig) -> list[str]:
    if config.context_dim is None:
        return [_IMAGE_ATTENTION[name] for name in rest]
    names = [_TRANSFORMER.get(name, name) for name in rest]
    return [re.sub(r"^block_(\d+)$", r"transformer_blocks.\1", name) for name in names]


def _stage_name(module: str, rest: str, config: AutoencoderConfig) -> str:
    if rest == "quantize/embedding":
        return "quantize.embedding"
    side, *parts = module.split("/")
    if not parts:
        return side  # quant_conv, post_quant_conv
    level, *inner = parts
    if level in ("conv_in", "conv_out", "norm_out"):
        return f"{side}.{level.replace('norm_out', 'conv_norm_out')}"
    name, *leaf = inner
    if level == "mid":
        where = f"{side}.mid_block.{_STAGE_MIDDLE[name]}"
    else:
        direction, index = level.split("_")
        # Diffusers counts the decoder's levels in the order in which they run.
        index = int(index) if direction == "down" else len(config.ch_mult) - 1 - int(index)
        where = f"{side}.{direction}_blocks.{index}"
        if name in ("downsample", "upsample"):
            return f"{where}.{name}rs.0.conv"
        kind, number = name.split("_")
        where += f".{'resnets' if kind == 'block' else 'attentions'}.{number}"
    names = _IMAGE_ATTENTION if "attn" in name else _RES
    return ".".join([where, *(names.get(n, n) for n in leaf)])


def _adapt(entry: keys.KeyEntry, parts: list[LazyTensor], config: UNetConfig) -> LazyTensor:
    """The tensors as the LDM key has them: windows of one added, projections fused."""
    shape = _without_window(parts[0].shape)
    if len(parts) == 3:
        if any(_without_window(part.shape) != shape for part in parts):
            return dataclasses.replace(parts[0], shape=shape)  # reported as a wrong shape
        shape = (3 * shape[0], *shape[1:])
    same = shape == _without_window(entry.shape)
    read = functools.partial(_fuse, parts, entry.shape, config)
    return LazyTensor(entry.shape if same else shape, parts[0].dtype, read)


def _without_window(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _fuse(parts: list[LazyTensor], shape: tuple[int, ...], config: UNetConfig) -> np.ndarray:
    if len(parts) == 1:
        return parts[0].read().reshape(shape)
    channels = shape[0] // 3
    heads = config.num_heads
    if config.num_head_channels is not None:
        heads = channels // config.num_head_channels
    # The original keeps query, key and value of one head together.
    stacked = [part.read().reshape(heads, channels // heads, -1) for part in parts]
    return np.stack(stacked, axis=1).reshape(shape)


def read_config(
    path: pathlib.Path, stage_folder: pathlib.Path, classes: LazyTensor | None
) -> LatentDiffusionConfig:
    """The config that the JSON files of a diffusers folder describe.

    Raises:
      VqjaxError: if they are missing, or lists all in which they describe what no LDM is.
    """
    files = {"unet": path / "unet" / "config.json", "first_stage": stage_folder / "config.json"}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        files["scheduler"] = scheduler
    found = {part: _read_json(file) for part, file in files.items()}
    problems = [
        f"{file.relative_to(path)}: {misfit}"
        for part, file in files.items()
        for misfit in _misfits(found[part], _REQUIRED[part])
    ]
    try:
        config = LatentDiffusionConfig(
            name=path.resolve().name,
            unet=_unet_config(found["unet"]),
            first_stage=_stage_config(found["first_stage"]),
            n_classes=0 if classes is None else classes.shape[0],
            scale_factor=_scale_factor(found["first_stage"]),
            **_schedule(found.get("scheduler")),
        )
        problems += misfits(config)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    if problems:
        raise gathered(
            problems,
            f"{path}: its JSON files describe no latent diffusion model that vqjax knows; where "
            f"they are wrong, correct them or pass the config that it was trained with (published "
            f"ones: {', '.join(PRESETS)}):",
        )
    for name, make in PRESETS.items():
        if dataclasses.replace(config, name=name) == make():
            return make()
    return config


def _misfits(found: dict[str, Any], required: Mapping[str, _Field]) -> list[str]:
    """What a file says, or leaves to the library's defaults, that our models do not compute."""
    misfits = []
    for name, field in required.items():
        if found.get(name, field.absent) in field.accepted:
            continue
        value = repr(found[name]) if name in found else f"absent, which means {field.absent!r}"
        expected = " or ".join(map(repr, field.accepted))
        misfits.append(f"{name} {value}, expected {expected}")
    return misfits


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VqjaxError(
            f"{path}: not readable ({error}); add it, or pass the config that the model was "
            f"trained with (published ones: {', '.join(PRESETS)})"
        ) from error
    if not isinstance(found, dict):
        raise VqjaxError(f"{path}: a {type(found).__name__}, expected an object")
    return found


def _schedule(found: dict[str, Any] | None) -> dict[str, Any]:
    """The noise schedule; without a scheduler's file, that of the published models."""
    if found is None:
        return {}
    return {
        "timesteps": int(found.get("num_train_timesteps", 1000)),
        "linear_start": float(found.get("beta_start", _BETA_START)),
        "linear_end": float(found.get("beta_end", _BETA_END)),
    }


def _unet_config(found: dict[str, Any]) -> UNetConfig:
    channels, kinds = found["block_out_channels"], found["down_block_types"]
    crossed = any("CrossAttn" in kind for kind in kinds)
    # In diffusers `attention_head_dim` of a U-Net with context is the number of heads.
    heads = found.get("num_attention_heads") or found.get("attention_head_dim", 8)
    return UNetConfig(
        in_channels=found["in_channels"],
        out_channels=found["out_channels"],
        model_channels=channels[0],
        num_res_blocks=int(found["layers_per_block"]),
        attention_resolutions=tuple(2**i for i, kind in enumerate(kinds) if "Attn" in kind),
        channel_mult=_multiples(channels),
        num_heads=int(heads) if crossed else 1,
        num_head_channels=None if crossed else found.get("attention_head_dim", 8),
        transformer_depth=int(found.get("transformer_layers_per_block", 1)),
        context_dim=int(found["cross_attention_dim"]) if crossed else None,
        use_scale_shift_norm=found.get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=found.get("downsample_type", "conv") == "resnet",
    )


def _scale_factor(found: dict[str, Any]) -> float:
    """Where it is absent, the library's default for Gaussian posteriors. Published codebook models
    (CompVis/ldm-celebahq-256) are from before the field, and mean 1."""
    return float(found.get("scaling_factor", 1.0 if "num_vq_embeddings" in found else 0.18215))


def _stage_config(found: dict[str, Any]) -> AutoencoderConfig:
    channels, kinds = found["block_out_channels"], found["down_block_types"]
    vector_quantized = "num_vq_embeddings" in found
    latent = found["latent_channels"]
    return AutoencoderConfig(
        kind="vq" if vector_quantized else "kl",
        resolution=found["sample_size"],
        in_channels=found["in_channels"],
        out_channels=found["out_channels"],
        ch=channels[0],
        ch_mult=_multiples(channels),
        num_res_blocks=int(found["layers_per_block"]),
        attn_resolutions=tuple(
            found["sample_size"] // 2**i for i, kind in enumerate(kinds) if "Attn" in kind
        ),
        z_channels=latent,
        embed_dim=(found.get("vq_embed_dim") or latent) if vector_quantized else latent,
        n_embed=found["num_vq_embeddings"] if vector_quantized else 0,
    )


def _multiples(channels: list[int]) -> tuple[int, ...]:
    if any(count % channels[0] for count in channels):
        raise ValueError(f"channels {channels} are no multiples of the first")
    return tuple(count // channels[0] for count in channels)
