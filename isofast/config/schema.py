"""The configuration of a run: every key, its default and what it means.

What the user sets wins over the presets (presets.py), which win over the defaults here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from isofast.config.plugins import method_class
from isofast.config.presets import (
    METHODS,
    VIEWS_OF_DATASET,
    merge,
    method_preset,
    optimizer_preset,
    stem_preset,
)
from isofast.errors import UserError

SCHEMA_KEY = "$schema"
RESNETS = ("resnet18", "resnet34", "resnet50")
# Marks fields that may change when a run continues: no result depends on them.
FREE: dict[str, Any] = {"may_change_on_resume": True}


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1]:
        raise ValueError("should be a range [low, high], 0 < low <= high")
    return value


def _share(value: tuple[float, float]) -> tuple[float, float]:
    if value[1] > 1:
        raise ValueError("a crop is at most the whole image, 1.0")
    return value


# JSON has no tuples
Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ordered)]
Share = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]


class ViewConfig(_Section):
    """The transforms of one random view, in this order. Probabilities are per image, lengths
    fractions of the crop, angles degrees; an operation that can't happen costs nothing."""

    crop_scale: Annotated[Range, AfterValidator(_share)] = (0.08, 1.0)
    """Area of the crop, as a share of the image."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Width of the crop over its height."""
    degrees: Strength = 0.0
    """Largest rotation."""
    translate: Strength = 0.0
    """Largest shift in each direction."""
    scale: Range = (1.0, 1.0)
    """Zoom."""
    shear: Strength = 0.0
    """Largest shear along the rows."""
    jitter_p: Share = 0.8
    """Probability of colour jitter; a strength s draws a factor from 1 - s to 1 + s."""
    brightness: Strength = 0.4
    """Strength of the jitter's brightness."""
    contrast: Strength = 0.4
    """Strength of the jitter's contrast."""
    saturation: Strength = 0.2
    """Strength of the jitter's saturation."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Largest turn of the hue, as a share of the colour circle."""
    gray_p: Share = 0.2
    """Probability of a gray image."""
    blur_p: Share = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Its sigma in pixels."""
    solarize_p: Share = 0.0
    """Probability of inverting bright pixels."""
    solarize_threshold: int = Field(128, ge=0, le=255)
    """The darkest that is inverted, of 0 to 255."""
    flip_p: Share = 0.5
    """Probability of a mirror image."""

    @property
    def has_affine(self) -> bool:
        """Whether any image is rotated, moved, scaled or sheared."""
        return (self.degrees, self.translate, self.scale, self.shear) != (0.0, 0.0, (1.0, 1.0), 0.0)

    @property
    def has_colour(self) -> bool:
        """Whether any image changes colour (jitter or gray)."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        return self.gray_p > 0.0 or (self.jitter_p > 0.0 and any(strengths))


class AugmentationConfig(_Section):
    """The two views' random transforms; preset: the paper's, for digits and image folders ours."""

    view1: ViewConfig = ViewConfig()
    """Of the first view."""
    view2: ViewConfig = ViewConfig()
    """Of the second."""


class DataConfig(_Section):
    """Which images, and how they reach the network."""

    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "tinyimagenet", "imagefolder"] = (
        "imagefolder"
    )
    """Names the augmentation recipe and the stem that fit; imagefolder is any folder of images."""
    root: Path = Field(strict=False, json_schema_extra=FREE)
    """Folder with train/CLASS/IMAGE, val/CLASS/IMAGE, optionally unlabeled/IMAGE; JPEG or PNG, as
    files or in tars."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Stop at files that are unreadable at the start, or skip them. A file lost later always stops
    the run."""
    check: Literal["full", "headers", "off"] = Field("full", json_schema_extra=FREE)
    """Check of new files before the first step: full decodes each, headers reads formats and sizes,
    off opens none. Without full, a damaged file ends the run that reaches it or crashes DALI."""
    backend: Literal["auto", "dali", "resident"] = Field("auto", json_schema_extra=FREE)
    """dali decodes batch by batch; resident decodes once and keeps the images on the device (images
    of one size, no affine maps). auto: resident if the images allow it and fit, on a GPU or without
    DALI; else dali. A run keeps its first backend."""
    resident_limit_gb: float = Field(8.0, gt=0, json_schema_extra=FREE)
    """Limit of resident images on each device, in 10^9 bytes."""
    crop: int | None = Field(None, ge=8)
    """Side of the network's square input, in pixels; null takes the data set's."""
    augmentation: AugmentationConfig = Field(default_factory=dict, validate_default=True)
    """Random transforms; preset: the data set's."""
    threads: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Decoding threads or processes a rank; null shares the machine's cores among its ranks."""
    prefetch: int = Field(2, ge=1, le=16, json_schema_extra=FREE)
    """Batches prepared ahead by dali."""
    stall_seconds: float = Field(300.0, gt=0, json_schema_extra=FREE)
    """End a run that waits longer for a batch of images, in place of hanging."""

    @field_validator("augmentation", mode="before")
    @classmethod
    def _of_the_data_set(cls, raw: Any, info: ValidationInfo) -> Any:
        preset = VIEWS_OF_DATASET.get(info.data.get("dataset", ""))
        return merge(preset, raw) if preset and isinstance(raw, Mapping) else raw


class EncoderConfig(_Section):
    """The backbone, x_BCHW -> h_BF."""

    name: str = "resnet18"
    """A torchvision ResNet (resnet18, resnet34, resnet50), timm:NAME, or module:function, your own
    function that returns the module. stem, stem_padding and width are for the ResNets."""
    stem: Literal["cifar", "tiny", "imagenet"] = "imagenet"
    """First layers: cifar 3x3, tiny 3x3 and max-pool, imagenet 7x7 stride 2 and max-pool. Preset:
    the paper's for the data set; for an imagefolder cifar at a data.crop of up to 32, tiny up to
    64."""
    stem_padding: int = Field(1, ge=0, le=2)
    """Padding of the 3x3 stems in pixels; 2 is the released code's (34 x 34 maps)."""
    width: int = Field(64, ge=4)
    """Channels of the first stage of resnet18 or resnet34; 64 is torchvision's, less is faster."""
    init: str | None = None
    """File of weights to begin with: an encoder.safetensors, or a torchvision or timm checkpoint of
    the same encoder. A classifier in it is left out, a first convolution of another size stays
    random. Not read when a run continues."""

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        if name not in RESNETS and ":" not in name:
            raise ValueError(f"allowed are {', '.join(RESNETS)}, timm:NAME and module:function")
        return name

    @field_validator("width")
    @classmethod
    def _needs_basic_blocks(cls, width: int, info: ValidationInfo) -> int:
        name = info.data.get("name")
        if width != 64 and name not in (None, "resnet18", "resnet34"):
            raise ValueError(f"only resnet18 and resnet34 have a width; leave it at 64 for {name}")
        return width


class ProjectorConfig(_Section):
    """Linear - BatchNorm - ReLU - Linear on the backbone's pooled features."""

    hidden: int = Field(4096, ge=1)
    """Hidden units, also of byol's and simsiam's predictor."""
    output: int = Field(256, ge=2)
    """Embedding dimension D."""


class MethodConfig(_Section):
    """What every method has; each adds fields of its own (isofast/methods)."""

    name: str
    """A built-in method, or module:Class for your own. isoloss, directpred and directcopy predict
    with W = f(C), isoloss with the isotropic gradient; byol, simsiam and linear train a predictor;
    sigreg has none, and a loss of its own (docs/guide/runs.md)."""
    ema: bool = False
    """Targets from a slowly moving copy of the network; false reuses the online embeddings."""
    ema_base: float = Field(0.99, ge=0, le=1)
    """The target's decay at the first step; it rises to 1 along a half cosine. Preset: 0.99, the
    paper's; 0.9 for closed forms with method.correlation directions."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Weight kept by the moving average C of the embeddings each step."""
    correlation: Literal["embeddings", "directions"] = "embeddings"
    """What C averages: z z^T, as in the paper, or that of z / |z|, so that long embeddings don't
    dominate (ours; docs/method/first-steps.md). Preset: directions for the cosine in runs of under
    100 epochs and on data sets that are not the paper's."""


class OptimizerConfig(_Section):
    """Optimizer of the network and of the online probe."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """Preset: lars with EMA, sgd without; sgd always with method.correlation directions."""
    lr: float = Field(1.0, gt=0)
    """Peak learning rate at a global batch of 256; scaled linearly with the batch. Preset: 1.0 for
    lars, 0.1 for sgd, 0.001 for adamw; 0.3 for the sgd of closed forms with method.correlation
    directions."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of lars and sgd, first beta of adamw."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay, in lars and adamw of matrices only. Preset: 1e-4; 1e-5 for byol, simsiam and
    your own methods."""
    eta: float = Field(0.02, gt=0)
    """Trust coefficient of lars."""
    probe_lr: float = Field(0.1, gt=0)
    """Peak learning rate of the online probe at a global batch of 256, on the same schedule."""


class ScheduleConfig(_Section):
    """Learning rate over the run: linear warm-up, then a half cosine to 0."""

    warmup_epochs: float | None = Field(None, ge=0)
    """Epochs of warm-up; null: 10, or a tenth of a run shorter than 100 epochs."""
    warmup_start: float = Field(3e-5, ge=0)
    """Learning rate at the first step."""


class TrainConfig(_Section):
    """Length, batch and arithmetic of the run."""

    epochs: int = Field(1000, ge=1)
    """Passes over the training images; the schedule's length."""
    max_steps: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Stop after this many steps. The schedule keeps its length; raise it to continue."""
    batch_size: int = Field(256, ge=2)
    """Images a step over all ranks; each rank takes an equal share."""
    accumulation: int = Field(1, ge=1)
    """Pieces in which a rank's share passes the networks, to need less memory: activations of one
    piece are held, and made a second time for the gradients. Loss, C and target are of the whole
    batch, BatchNorm statistics of a piece."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of the networks; auto: bf16 on a GPU and on a CPU with AVX512-BF16 or AMX,
    else fp32, where a GPU convolves in TF32. Parameters, BatchNorm, C and the loss are always
    fp32."""
    batch_norm: Literal["auto", "local", "synchronised"] = "auto"
    """Statistics of one rank or of all; auto: synchronised."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the networks; auto: on a GPU only."""
    cuda_graph: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=FREE)
    """The whole step as one CUDA graph, in one process. auto: on a GPU, unless method or encoder is
    your own, whose Python values a graph would freeze, or method.alpha takes an eigendecomposition
    (other than 0.5, 1, 2, and 0.25 with method.eps of 0.1 or more)."""
    on_collapse: Literal["warn", "stop"] = Field("warn", json_schema_extra=FREE)
    """What to do when the embeddings have collapsed."""


class EvaluationConfig(_Section):
    """Clean top-1 of the online probe and k-NN, on the validation images."""

    every_epochs: int = Field(10, ge=0, json_schema_extra=FREE)
    """Epochs between evaluations, with one at the end; 0: never."""
    at_start: bool = Field(False, json_schema_extra=FREE)
    """Also evaluate before the first step."""
    knn_images: int = Field(5000, ge=1, json_schema_extra=FREE)
    """Training images in the k-NN bank (fewer if there are fewer)."""
    knn_k: int = Field(200, ge=1, le=200, json_schema_extra=FREE)
    """Neighbours that vote (fewer if the bank is smaller)."""
    knn_temperature: float = Field(0.07, gt=0, json_schema_extra=FREE)
    """Votes weigh exp(cosine similarity / temperature)."""
    knn_pixels: bool = Field(False, json_schema_extra=FREE)
    """Also report the k-NN of the raw pixels, at the end; meant for small images."""
    metrics_images: int = Field(1000, ge=0, json_schema_extra=FREE)
    """Validation images of the metrics that need no labels (docs/method/metrics.md), the same in
    every run; 0: none of these metrics."""
    batch_size: int = Field(256, ge=1, json_schema_extra=FREE)
    """Images a forward pass and rank."""


class CheckpointConfig(_Section):
    """When the state is saved, besides at the end."""

    every_steps: int = Field(1000, ge=1, json_schema_extra=FREE)
    """Steps between checkpoints."""
    every_minutes: float | None = Field(10.0, gt=0, json_schema_extra=FREE)
    """Also after this many minutes without one; null: by steps only."""
    max_failures: int = Field(3, ge=0, json_schema_extra=FREE)
    """Checkpoints in a row that may fail, on a full disk, before the run ends."""
    keep: int = Field(2, ge=1, json_schema_extra=FREE)
    """How many of the newest are kept, besides the one with the best k-NN accuracy."""


class LoggingConfig(_Section):
    """What is recorded during the run."""

    every_steps: int = Field(50, ge=1, json_schema_extra=FREE)
    """Steps between records in metrics.jsonl, the loop's only host synchronisations."""
    spectrum_every_steps: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Steps between spectra of C in spectrum.npz, beside those at records and ends of epochs."""
    loggers: list[str] = Field(["tensorboard"], json_schema_extra=FREE)
    """Besides metrics.jsonl: tensorboard, wandb (a package to install), or module:Class, your own
    (isofast/run/loggers.py)."""

    @field_validator("loggers")
    @classmethod
    def _exist(cls, loggers: list[str]) -> list[str]:
        for name in loggers:
            if name not in ("tensorboard", "wandb") and ":" not in name:
                raise ValueError(
                    f"{name!r} is no logger; allowed are tensorboard, wandb and module:Class"
                )
        return loggers


class Config(_Section):
    """Everything that decides a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the weights, the order of the images and the augmentation."""
    data: DataConfig
    # before the sections whose presets depend on it
    train: TrainConfig = TrainConfig()
    encoder: EncoderConfig = Field(default_factory=dict, validate_default=True)
    projector: ProjectorConfig = ProjectorConfig()
    method: SerializeAsAny[MethodConfig] = Field(default_factory=dict, validate_default=True)
    optimizer: OptimizerConfig = Field(default_factory=dict, validate_default=True)
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = {}
    """Passed through to DeepSpeed; may not set what isofast derives."""

    @model_validator(mode="before")
    @classmethod
    def _drop_schema_key(cls, raw: Any) -> Any:
        is_tree = isinstance(raw, Mapping)
        return {key: raw[key] for key in raw if key != SCHEMA_KEY} if is_tree else raw

    @field_validator("encoder", "method", "optimizer", mode="before")
    @classmethod
    def _with_preset(cls, raw: Any, info: ValidationInfo) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        data, train, method = (info.data.get(name) for name in ("data", "train", "method"))
        if info.field_name == "encoder" and data is not None and ":" not in str(raw.get("name")):
            return {"stem": stem_preset(data.dataset, data.crop), **raw}
        if info.field_name == "optimizer" and method is not None:
            chosen = str(raw.get("name"))
            implied = optimizer_preset(method.name, method.correlation, method.ema, chosen)
            return {**implied, **raw}
        if info.field_name == "method":
            tree = {"name": "isoloss", **raw}
            config_class = method_class(tree["name"]).Config
            if data is not None and train is not None:
                tree = method_preset(data.dataset, train.epochs, tree) | tree
            # read as JSON, whose lists are also the tuples of a class of your own
            return config_class.model_validate_json(json.dumps(tree, default=str))
        return raw

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up, resolved."""
        given = self.schedule.warmup_epochs
        return min(10.0, self.train.epochs / 10) if given is None else given

    def batch_size_per_rank(self, world_size: int) -> int:
        """Return the images of each rank in a step.

        Raises:
            UserError: the global batch does not divide by ``world_size`` and the pieces, or leaves
                one a single image, which has no batch statistics.
        """
        pieces = self.train.accumulation
        each, rest = divmod(self.train.batch_size, world_size * pieces)
        if rest or each < 2:
            near = max(2, round(self.train.batch_size / world_size / pieces)) * world_size * pieces
            and_pieces = f" times train.accumulation={pieces}" if pieces > 1 else ""
            raise UserError(
                f"train.batch_size is the global batch and must be a multiple of the number of "
                f"processes{and_pieces}, with at least 2 images each: got "
                f"{self.train.batch_size} for {world_size} processes. Try --set "
                f"train.batch_size={near}"
            )
        return each * pieces


def to_json(config: Config) -> str:
    """Return the resolved config as JSON, readable by ``load_config``."""
    return config.model_dump_json(indent=2) + "\n"


def schema_json() -> str:
    """Return the JSON schema of a config file, as shipped in launch/config.schema.json."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    of_your_own = definitions.pop("MethodConfig")
    of_your_own |= {"title": "A class of your own", "additionalProperties": True}
    of_your_own["properties"]["name"]["pattern"] = ":"
    definitions["module:Class"] = of_your_own
    for name in METHODS:
        definitions[name] = method_class(name).Config.model_json_schema()
    refs = [{"$ref": f"#/$defs/{name}"} for name in (*METHODS, "module:Class")]
    schema["properties"]["method"] = {"anyOf": refs}
    schema["properties"][SCHEMA_KEY] = {"type": "string", "description": "Schema for editors."}
    return json.dumps(schema, indent=2) + "\n"


def changed_keys(old: Config, new: Config) -> list[str]:
    """Return what differs between two configs and changes the result, as ``key: old -> new``."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key on which a result depends, as ``section.key``, with its value."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        elif field.json_schema_extra != FREE:
            yield f"{prefix}{name}", value
