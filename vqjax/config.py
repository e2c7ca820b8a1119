# SPDX-License-Identifier: Apache-2.0
"""Model configurations: frozen dataclasses that describe a latent diffusion model completely.

They are plain data (JSON in, JSON out through `to_dict` and `from_dict`) and import nothing of
ours, so that every layer may use them. The constructors carry the published configurations of
CompVis/latent-diffusion (`configs/latent-diffusion/*.yaml`, commit a506df5).
"""

import dataclasses
import json
import os
import pathlib
import sys
import typing
from typing import Any, Literal, Self

from vqjax.errors import VqjaxError, gathered


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The noise-prediction U-Net (LDM `openaimodel.UNetModel`). Field names are the original ones.

    Attributes:
      attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention is used.
      channel_mult: channels of each level, as multiples of `model_channels`.
      num_heads: attention heads; ignored where `num_head_channels` is set.
      num_head_channels: channels of one head, or None to use `num_heads`.
      context_dim: width of the context tokens, or None for a model without context. With a context,
        attention is a `SpatialTransformer` (self-attention, cross-attention, GEGLU); without, an
        `AttentionBlock` (self-attention alone).
      use_scale_shift_norm: the time embedding scales and shifts a residual block's second norm.
      resblock_updown: residual blocks change the resolution, in place of plain convolutions.
    """

    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 192
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (2, 4, 8)
    channel_mult: tuple[int, ...] = (1, 2, 3, 5)
    num_heads: int = 1
    num_head_channels: int | None = None
    transformer_depth: int = 1
    context_dim: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The first stage (LDM `VQModelInterface` or `AutoencoderKL`), `ddconfig` names kept.

    Attributes:
      kind: "vq" quantizes the latent with a codebook in decode, "kl" has a Gaussian posterior.
      resolution: image height and width in pixels that the model was trained for.
      embed_dim: latent channels, as the U-Net sees them.
      n_embed: codebook rows; 0 for "kl".
    """

    kind: Literal["vq", "kl"] = "vq"
    resolution: int = 256
    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 3
    embed_dim: int = 3
    n_embed: int = 8192

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along one axis: 4 for f4, 8 for f8."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """A whole latent diffusion model: U-Net, first stage, class embedder and noise schedule.

    Attributes:
      name: what reports call it.
      n_classes: rows of the class embedding, 0 for an unconditional model. The last row is the
        "no class" of classifier-free guidance.
      linear_start, linear_end: ends of the noise schedule; beta is linear in its square root.
      scale_factor: the U-Net sees first-stage latents times this.
      guidance: classifier-free guidance of this model's samples, reports and scores, unless another
        is asked for.
    """

    name: str
    unet: UNetConfig
    first_stage: AutoencoderConfig
    n_classes: int = 0
    timesteps: int = 1000
    linear_start: float = 0.0015
    linear_end: float = 0.0195
    scale_factor: float = 1.0
    guidance: float = 3.0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latent (NHWC without N)."""
        side = self.first_stage.resolution // self.first_stage.downsampling
        return side, side, self.unet.in_channels

    @property
    def small(self) -> bool:
        """Whether a CPU samples and trains the model in minutes: pictures of 64 pixels or less.

        Its operations are too small to keep all cores busy: several batches at a time do.
        """
        return self.first_stage.resolution <= 64

    @property
    def null_class(self) -> int:
        """Class id of the unconditional branch."""
        return self.n_classes - 1

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts, lists and scalars, ready for `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
          VqjaxError: names every missing or unknown field, or every value of another type, or
            every value that `misfits` finds.
        """
        data = dict(data)
        data["unet"] = _build(UNetConfig, data.get("unet", {}), "unet")
        data["first_stage"] = _build(AutoencoderConfig, data.get("first_stage", {}), "first_stage")
        config = _build(cls, data, "model config")
        check(config)
        return config

    @classmethod
    def cin256_v2(cls) -> Self:
        """Class-conditional ImageNet 256x256, VQ-f4 (`cin256-v2.yaml`), 400.9M-parameter U-Net."""
        return cls(
            name="cin256-v2",
            unet=UNetConfig(context_dim=512),
            first_stage=AutoencoderConfig(),
            n_classes=1001,
        )

    @classmethod
    def _vq_f4_unconditional(cls, name: str) -> Self:
        unet = UNetConfig(model_channels=224, channel_mult=(1, 2, 3, 4), num_head_channels=32)
        return cls(name=name, unet=unet, first_stage=AutoencoderConfig())

    @classmethod
    def celebahq(cls) -> Self:
        """CelebA-HQ 256x256, unconditional, VQ-f4 (`celebahq-ldm-vq-4.yaml`)."""
        return cls._vq_f4_unconditional("celebahq")

    @classmethod
    def ffhq(cls) -> Self:
        """FFHQ 256x256, unconditional, VQ-f4 (`ffhq-ldm-vq-4.yaml`)."""
        return cls._vq_f4_unconditional("ffhq")

    @classmethod
    def lsun_bedrooms(cls) -> Self:
        """LSUN bedrooms 256x256, unconditional, VQ-f4 (`lsun_bedrooms-ldm-vq-4.yaml`)."""
        return cls._vq_f4_unconditional("lsun_bedrooms")

    @classmethod
    def lsun_churches(cls) -> Self:
        """LSUN churches 256x256, unconditional, KL-f8 (`lsun_churches-ldm-kl-8.yaml`)."""
        return cls(
            name="lsun_churches",
            unet=UNetConfig(
                in_channels=4,
                out_channels=4,
                attention_resolutions=(1, 2, 4, 8),
                channel_mult=(1, 2, 2, 4, 4),
                num_heads=8,
                use_scale_shift_norm=True,
                resblock_updown=True,
            ),
            first_stage=AutoencoderConfig(
                kind="kl", ch_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4, n_embed=0
            ),
            linear_end=0.0155,
        )

    @classmethod
    def digits(cls) -> Self:
        """The embedded model: handwritten digits 32x32, every part of `cin256-v2` at small size."""
        return cls(
            name="digits",
            unet=UNetConfig(
                model_channels=32,
                channel_mult=(2, 3),
                num_res_blocks=1,
                attention_resolutions=(2,),
                context_dim=64,
            ),
            first_stage=AutoencoderConfig(
                resolution=32, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, n_embed=1024
            ),
            n_classes=11,
            guidance=1.5,  # at 3 its samples lose diversity: digit-FD 13 in place of 4
        )

    @classmethod
    def textures(cls) -> Self:
        """Crops of photographs 32x32, harder on high frequencies: half the downsampling of digits.

        Nobody ships it; `python -m vqjax.train.textures` trains it.
        """
        digits = cls.digits()
        return dataclasses.replace(
            digits,
            name="textures",
            first_stage=dataclasses.replace(digits.first_stage, ch_mult=(1, 2), n_embed=2048),
            n_classes=10,  # nine photographs, and none
        )


PRESETS = {
    "cin256-v2": LatentDiffusionConfig.cin256_v2,
    "celebahq": LatentDiffusionConfig.celebahq,
    "ffhq": LatentDiffusionConfig.ffhq,
    "lsun_bedrooms": LatentDiffusionConfig.lsun_bedrooms,
    "lsun_churches": LatentDiffusionConfig.lsun_churches,
    "digits": LatentDiffusionConfig.digits,
    "textures": LatentDiffusionConfig.textures,
}
"""Published configurations by name, as `--config` takes them."""


def find(wanted: "str | os.PathLike | LatentDiffusionConfig") -> LatentDiffusionConfig:
    """The configuration that a `--config` names.

    Args:
      wanted: a name of `PRESETS`; or a JSON file, which holds what `to_dict` returns, fields that
        have defaults being optional. A configuration itself is returned.

    Raises:
      VqjaxError: if it is neither, the file's fields are not those of a configuration, or there are
        `misfits`.
    """
    if isinstance(wanted, LatentDiffusionConfig):
        check(wanted)
        return wanted
    if wanted in PRESETS:
        return PRESETS[str(wanted)]()
    path = pathlib.Path(wanted)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise VqjaxError(
            f"--config {path}: {error.strerror or error}; expected one of {', '.join(PRESETS)}, or "
            "a JSON file (docs/import.md)"
        ) from None
    except ValueError as error:
        raise VqjaxError(f"--config {path}: no JSON ({error}); see docs/import.md") from None
    if not isinstance(data, dict):
        raise VqjaxError(f"--config {path}: found {type(data).__name__}, expected an object")
    try:
        return LatentDiffusionConfig.from_dict(data)
    except VqjaxError as error:
        raise VqjaxError(f"--config {path}: {error}") from None


_MOST = {"timesteps": 100_000, "num_res_blocks": 100, "transformer_depth": 100}
_MOST_LEVELS = 16
"""Beyond what models have; a damaged file would fill memory."""


def misfits(config: LatentDiffusionConfig) -> list[str]:
    """Values that no model can be computed with, a line each: field, what was found and expected.

    Types are taken to be right. Each value is looked at alone: not whether sizes divide each other.
    """
    unet, stage = config.unet, config.first_stage
    least = {"timesteps": 2, "num_res_blocks": 0, "transformer_depth": 0, "n_classes": 0}
    least["n_embed"] = 1 if stage.kind == "vq" else 0
    if unet.num_head_channels is not None:
        least["num_heads"] = unet.num_heads  # ignored, and -1 by default in the original
    found = []
    for where, part in (("unet.", unet), ("first_stage.", stage), ("", config)):
        for name, kind in typing.get_type_hints(type(part)).items():
            value = getattr(part, name)
            expected = _expected(name, kind, value, least.get(name, 1), _MOST.get(name))
            if expected is not None:
                found.append(f"{where}{name}: found {value!r}, expected {expected}")
    start, end = config.linear_start, config.linear_end
    if not 0 < start <= end < 1:  # beta: a variance that is added, a part of the whole
        wanted = "0 < linear_start <= linear_end < 1"
        found.append(f"linear_start, linear_end: found {start!r}, {end!r}, expected {wanted}")
    if not 0 < config.scale_factor <= sys.float_info.max:
        found.append(f"scale_factor: found {config.scale_factor!r}, expected a number above 0")
    if not abs(config.guidance) <= sys.float_info.max:
        found.append(f"guidance: found {config.guidance!r}, expected a finite number")
    return found


def _expected(name: str, kind: Any, value: Any, least: int, most: int | None) -> str | None:
    """What a whole number, or several, should be; None where it is, and for all else."""
    if typing.get_origin(kind) is tuple:
        empty = name in ("attention_resolutions", "attn_resolutions")
        if (value or empty) and len(value) <= _MOST_LEVELS and all(item >= 1 for item in value):
            return None
        some = "or none" if empty else "at least one"
        return f"whole numbers of 1 or more, {some}, at most {_MOST_LEVELS}"
    if kind not in (int, int | None) or value is None:
        return None
    if least <= value <= (value if most is None else most):
        return None
    if most is not None:
        return f"{least} to {most:,}"
    return f"{least} or more" if kind is int else f"{least} or more, or null"


def check(config: LatentDiffusionConfig) -> None:
    """Raises VqjaxError, which lists the `misfits`, where there are any."""
    if problems := misfits(config):
        raise gathered(problems, "model config: values that do not fit:")


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise VqjaxError(f"{where}: found {data!r}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise VqjaxError(
            f"{where}: unknown fields {unknown}, missing fields {missing}; "
            f"expected {sorted(fields)}"
        )
    data = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
    }
    kinds = typing.get_type_hints(cls)
    problems = [
        f"{name}: found {value!r}, expected {_shown(kinds[name])}"
        for name, value in data.items()
        if not _fits(kinds[name], value)
    ]
    if problems:
        raise gathered(problems, f"{where}: values that do not fit:")
    return cls(**data)


def _shown(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return str(kind) if typing.get_args(kind) else kind.__name__


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(int, item) for item in value)
    if parts := typing.get_args(kind):
        return any(_fits(part, value) for part in parts)
    if kind in (int, float):  # true is no number, and a whole one serves as a float
        return type(value) in (int, kind)
    return isinstance(value, kind)
