# SPDX-License-Identifier: Apache-2.0
"""Folders in diffusers layout, made from LDM keys by rules of their own, as conversion does it."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.io import models, torch_writer
from vqjax.config import PRESETS, LatentDiffusionConfig
from vqjax.errors import VqjaxError
from vqjax.io import diffusers, keys, load_model

CONFIGS = {c.name: c for c in (models.CLASSES, models.PLAIN, models.UPDOWN)}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
UNET_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
STAGE_PARTS = {
    r"\.down\.(\d+)\.block\.": r".down_blocks.\1.resnets.",
    r"\.down\.(\d+)\.attn\.": r".down_blocks.\1.attentions.",
    r"\.down\.(\d+)\.downsample\.": r".down_blocks.\1.downsamplers.0.",
    r"\.mid\.block_1": ".mid_block.resnets.0",
    r"\.mid\.block_2": ".mid_block.resnets.1",
    r"\.mid\.attn_1": ".mid_block.attentions.0",
    r"\.norm_out": ".conv_norm_out",
    "nin_shortcut": "conv_shortcut",
    r"(attentions\.\d)\.norm": r"\1.group_norm",
    r"(attentions\.\d)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\.\d)\.proj_out": r"\1.to_out.0",
}


def unet_tensors(config: LatentDiffusionConfig, tensors: dict) -> dict[str, np.ndarray]:
    layers, found = config.unet.num_res_blocks + 1, {}
    for key, value in tensors.items():
        if not key.startswith(keys.UNET_PREFIX):
            continue
        name, leaf = key.removeprefix(keys.UNET_PREFIX).rsplit(".", 1)
        top = UNET_TOP.get(name)
        if top is None:
            for old, new in UNET_PARTS.items():
                name = name.replace(old, new)
            name = _blocks(name, layers, config)
        found |= _attention(top or name, leaf, value, config)
    return found


def _blocks(name: str, layers: int, config: LatentDiffusionConfig) -> str:
    if name.startswith("middle_block"):
        for old, new in (("0", "resnets.0"), ("1", "attentions.0"), ("2", "resnets.1")):
            name = re.sub(rf"^middle_block\.{old}", f"mid_block.{new}", name)
        return name
    side, index, part, rest = re.findall(r"^(\w+)_blocks\.(\d+)\.(\d)\.(.*)$", name)[0]
    index = int(index) - 1 if side == "input" else int(index)
    block, layer = divmod(index, layers)
    where = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if side == "input" and layer == layers - 1:
        return f"{where}.downsamplers.0.{rest.replace('op', 'conv')}"
    if part == "0":
        return f"{where}.resnets.{layer}.{rest}"
    if re.match(r"conv$|norm1|conv1|time_emb|norm2|conv2", rest):
        return f"{where}.upsamplers.0.{rest}"
    return f"{where}.attentions.{layer}.{rest}"


def _attention(name: str, leaf: str, value: np.ndarray, config: LatentDiffusionConfig) -> dict:
    if config.unet.context_dim is not None or "attentions" not in name:
        return {f"{name}.{leaf}": value}
    stem = name.rsplit(".", 1)[0]
    if name.endswith("qkv"):
        channels = value.shape[0] // 3
        heads = config.unet.num_heads
        if config.unet.num_head_channels:
            heads = channels // config.unet.num_head_channels
        width = channels // heads
        rows = np.arange(3 * channels).reshape(heads, 3, width)
        flat = value.reshape(3 * channels, -1) if leaf == "weight" else value
        return {
            f"{stem}.{part}.{leaf}": flat[rows[:, index].ravel()]
            for index, part in enumerate(("to_q", "to_k", "to_v"))
        }
    if name.endswith("proj_out"):
        return {f"{stem}.to_out.0.{leaf}": value[:, :, 0] if leaf == "weight" else value}
    return {f"{stem}.group_norm.{leaf}": value}


def stage_tensors(config: LatentDiffusionConfig, tensors: dict) -> dict[str, np.ndarray]:
    top, found = len(config.first_stage.ch_mult) - 1, {}
    for key, value in tensors.items():
        if not key.startswith(keys.FIRST_STAGE_PREFIX):
            continue
        name = key.removeprefix(keys.FIRST_STAGE_PREFIX)
        name = re.sub(r"\.up\.(\d)", lambda m: f".down.{top - int(m[1])}", name)
        name = name.replace("upsample", "downsample")
        for pattern, new in STAGE_PARTS.items():
            name = re.sub(pattern, new, name)
        if name.startswith("decoder"):
            name = name.replace("down_blocks", "up_blocks").replace("downsamplers", "upsamplers")
        if re.search(r"attentions\.\d\.to_.*weight", name):
            value = value[:, :, 0, 0]
        found[name] = value
    return found


def json_files(config: LatentDiffusionConfig) -> dict[str, dict]:
    unet, stage = config.unet, config.first_stage
    crossed = "CrossAttn" if unet.context_dim else "Attn"
    unet_json = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": [m * unet.model_channels for m in unet.channel_mult],
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": [
            (crossed if 2**i in unet.attention_resolutions else "") + "DownBlock2D"
            for i in range(len(unet.channel_mult))
        ],
        "attention_head_dim": unet.num_heads if unet.context_dim else unet.num_head_channels,
        "cross_attention_dim": unet.context_dim,
        "resnet_time_scale_shift": "scale_shift" if unet.use_scale_shift_norm else "default",
        "downsample_type": "resnet" if unet.resblock_updown else "conv",
    }
    stage_json = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [m * stage.ch for m in stage.ch_mult],
        "down_block_types": [
            "AttnDownEncoderBlock2D"
            if stage.resolution // 2**i in stage.attn_resolutions
            else "DownEncoderBlock2D"
            for i in range(len(stage.ch_mult))
        ],
        "layers_per_block": stage.num_res_blocks,
        "latent_channels": stage.z_channels,
        "sample_size": stage.resolution,
    }
    if stage.kind == "vq":
        stage_json["num_vq_embeddings"] = stage.n_embed
    else:
        stage_json["scaling_factor"] = config.scale_factor
    scheduler = {
        "beta_start": config.linear_start,
        "beta_end": config.linear_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": config.timesteps,
    }
    return {"unet": unet_json, "vqvae": stage_json, "scheduler": scheduler}


def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Image attention as diffusers named it before 0.15."""
    found = {}
    for name, value in tensors.items():
        if "transformer_blocks" not in name:
            for new, old in OLD.items():
                name = name.replace(f".{new}.", f".{old}.")
        found[name] = value
    return found


def write_json(path, files: dict[str, dict]) -> None:
    for part, content in files.items():
        (path / part).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (path / part / file).write_text(json.dumps(content))


def write(path, config: LatentDiffusionConfig, *, old=False, torch=False) -> None:
    tensors = models.tensors(config)
    parts = {"unet": unet_tensors(config, tensors), "vqvae": stage_tensors(config, tensors)}
    if config.n_classes:
        parts["class_embedder"] = {"embedding.weight": tensors[keys.CLASS_KEY]}
    write_json(path, json_files(config))
    for part, content in parts.items():
        (path / part).mkdir(exist_ok=True)
        content = renamed(content) if old else content
        content = {name: np.ascontiguousarray(value) for name, value in content.items()}
        if torch:
            torch_writer.save_legacy(path / part / "diffusion_pytorch_model.bin", content)
        else:
            file = path / part / "diffusion_pytorch_model.safetensors"
            safetensors_numpy.save_file(content, file)
    (path / "model_index.json").write_text("{}")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_load_exactly(name, old, tmp_path):
    config = CONFIGS[name]
    write(tmp_path, config, old=old, torch=old)
    models.assert_equal(load_model(tmp_path, config=config), models.dense(config))


@pytest.mark.parametrize("config", [models.CLASSES, models.PLAIN])
def test_the_config_is_read_from_the_folder(config, tmp_path):
    write(tmp_path / "some-model", config)
    loaded = load_model(tmp_path / "some-model")
    assert loaded.config == dataclasses.replace(config, name="some-model")


def change(path, part: str, edit) -> None:
    file = path / part / "diffusion_pytorch_model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    edit(tensors)
    safetensors_numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    ("config", "factor"),
    [(models.CLASSES, 1.0), (models.UPDOWN, 0.18215)],
)
def test_a_scale_that_is_absent_is_what_such_models_mean(config, factor, tmp_path):
    write(tmp_path, config)
    files = json_files(config)
    files["vqvae"].pop("scaling_factor", None)
    write_json(tmp_path, files)
    assert load_model(tmp_path).config.scale_factor == factor


def test_misfits_are_named_as_the_file_names_them(tmp_path):
    write(tmp_path, models.PLAIN)

    def edit(tensors):
        del tensors["conv_out.bias"]
        del tensors["mid_block.attentions.0.to_k.bias"]
        tensors["add_embedding.weight"] = np.zeros(3, np.float32)
        name = "down_blocks.0.resnets.0.conv1.weight"
        tensors[name] = tensors[name][:, :, :1]
        tensors["conv_in.bias"][0] = np.nan

    change(tmp_path, "unet", edit)
    with pytest.raises(VqjaxError) as caught:
        load_model(tmp_path)
    text = str(caught.value)
    for line in (
        "unet: conv_out.bias: missing",
        "mid_block.attentions.0.to_k.bias",
        "unet: add_embedding.weight: unknown",
        "unet: down_blocks.0.resnets.0.conv1.weight: shape",
        "unet: conv_in.bias: 1 of 32 values are NaN",
    ):
        assert line in text


def test_classes_need_their_embedding(tmp_path):
    write(tmp_path, models.CLASSES)
    (tmp_path / "class_embedder" / "diffusion_pytorch_model.safetensors").unlink()
    expected = r"'embedding\.weight' \[4, 8\] into class_embedder/"
    with pytest.raises(VqjaxError, match=expected):
        load_model(tmp_path, config=models.CLASSES)
    with pytest.raises(VqjaxError, match=r"needs its class embedding.*\[classes, 8\]"):
        load_model(tmp_path)


# As CompVis/ldm-celebahq-256 has them on the hub: of an early version, with fewer fields.
CELEBAHQ = {
    "unet": {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D"] + 3 * ["AttnDownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 64,
        "time_embedding_type": "positional",
        "up_block_types": 3 * ["AttnUpBlock2D"] + ["UpBlock2D"],
    },
    "vqvae": {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512],
        "down_block_types": 3 * ["DownEncoderBlock2D"],
        "in_channels": 3,
        "latent_channels": 3,
        "layers_per_block": 2,
        "num_vq_embeddings": 8192,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": 3 * ["UpDecoderBlock2D"],
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "trained_betas": None,
    },
}
ANOTHER_MODEL = {
    "unet": {
        "act_fn": "gelu",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 16,
        "resnet_time_scale_shift": "spatial",
        "timestep_post_act": "silu",
    },
    "vqvae": {"norm_num_groups": 16, "norm_type": "spatial", "shift_factor": 0.1},
    "scheduler": {"prediction_type": "v_prediction", "trained_betas": [0.1, 0.2]},
}


def read(path):
    return diffusers.read_config(path, path / "vqvae", None)


def test_a_converted_folder_of_the_hub_is_the_published_model(tmp_path):
    write_json(tmp_path, CELEBAHQ)
    assert read(tmp_path) == PRESETS["celebahq"]()


def test_folders_of_another_model_are_told_everything_that_is_wrong(tmp_path):
    files = {part: CELEBAHQ[part] | ANOTHER_MODEL[part] for part in CELEBAHQ}
    del files["scheduler"]["beta_schedule"]  # the library takes "linear" then
    del files["vqvae"]["block_out_channels"]
    write_json(tmp_path, files)
    with pytest.raises(VqjaxError) as caught:
        read(tmp_path)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"{tmp_path}: its JSON files describe no latent diffusion model")
    assert lines == [
        "  - unet/config.json: act_fn 'gelu', expected 'silu' or 'swish'",
        "  - unet/config.json: flip_sin_to_cos False, expected True",
        "  - unet/config.json: freq_shift 1, expected 0",
        "  - unet/config.json: norm_eps 1e-06, expected 1e-05",
        "  - unet/config.json: norm_num_groups 16, expected 32",
        "  - unet/config.json: resnet_time_scale_shift 'spatial', expected 'default' or "
        "'scale_shift'",
        "  - unet/config.json: timestep_post_act 'silu', expected None",
        "  - vqvae/config.json: norm_num_groups 16, expected 32",
        "  - vqvae/config.json: norm_type 'spatial', expected 'group'",
        "  - vqvae/config.json: shift_factor 0.1, expected None or 0",
        "  - scheduler/scheduler_config.json: beta_schedule absent, which means 'linear', expected "
        "'scaled_linear'",
        "  - scheduler/scheduler_config.json: prediction_type 'v_prediction', expected 'epsilon'",
        "  - scheduler/scheduler_config.json: trained_betas [0.1, 0.2], expected None",
        "  - KeyError: 'block_out_channels'",
    ]


def test_ends_of_the_schedule_are_the_librarys_where_its_file_does_not_say(tmp_path):
    write_json(tmp_path, CELEBAHQ | {"scheduler": {"beta_schedule": "scaled_linear"}})
    found = read(tmp_path)
    assert (found.linear_start, found.linear_end) == (0.0001, 0.02)


def test_values_that_no_model_has_are_named(tmp_path):
    schedule = CELEBAHQ["scheduler"] | {"beta_start": -0.0015, "num_train_timesteps": 0}
    write_json(tmp_path, CELEBAHQ | {"scheduler": schedule})
    with pytest.raises(VqjaxError, match=r"(?s)timesteps: found 0, .*linear_end: found -0\.0015, "):
        read(tmp_path)
    endless = CELEBAHQ["scheduler"] | {"num_train_timesteps": float("inf")}
    write_json(tmp_path, CELEBAHQ | {"scheduler": endless})
    with pytest.raises(VqjaxError, match="OverflowError: cannot convert float infinity"):
        read(tmp_path)


def test_folders_without_a_usable_config(tmp_path):
    write(tmp_path, models.PLAIN)
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"beta_schedule": "linear"}))
    with pytest.raises(VqjaxError, match="beta_schedule 'linear', expected 'scaled_linear'"):
        load_model(tmp_path)
    config = tmp_path / "unet" / "config.json"
    config.write_text("{}")
    scheduler.unlink()
    with pytest.raises(VqjaxError, match="describe no latent diffusion model"):
        load_model(tmp_path)
    config.unlink()
    with pytest.raises(VqjaxError, match=r"config\.json: not readable"):
        load_model(tmp_path)
