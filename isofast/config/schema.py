"""The configuration of a run: every key, its default and its meaning.

Values that the user sets override the presets (presets.py), which override the defaults here.
"""

import inspect
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
# Marks fields that may change when a run is resumed, because no result depends on them.
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
    """The random transforms of one view, in this order. Probabilities are per image, lengths are
    fractions of the crop, angles are in degrees; a transform that is off costs nothing."""

    crop_scale: Annotated[Range, AfterValidator(_share)] = (0.08, 1.0)
    """Area of the crop, as a fraction of the image."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, width / height."""
    degrees: Strength = 0.0
    """Maximum rotation."""
    translate: Strength = 0.0
    """Maximum shift in each direction."""
    scale: Range = (1.0, 1.0)
    """Zoom factor."""
    shear: Strength = 0.0
    """Maximum shear along the rows."""
    jitter_p: Share = 0.8
    """Probability of colour jitter; for a strength s, factors are drawn from [1 - s, 1 + s]."""
    brightness: Strength = 0.4
    """Strength of the brightness jitter."""
    contrast: Strength = 0.4
    """Strength of the contrast jitter."""
    saturation: Strength = 0.2
    """Strength of the saturation jitter."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Maximum hue shift, as a fraction of the colour circle."""
    gray_p: Share = 0.2
    """Probability of converting to grayscale."""
    blur_p: Share = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Sigma of the blur, in pixels."""
    solarize_p: Share = 0.0
    """Probability of solarizing, which inverts bright pixels."""
    solarize_threshold: int = Field(128, ge=0, le=255)
    """The darkest value that is inverted, from 0 to 255."""
    flip_p: Share = 0.5
    """Probability of a horizontal flip."""

    @property
    def has_affine(self) -> bool:
        """Whether images may be rotated, shifted, scaled or sheared."""
        return (self.degrees, self.translate, self.scale, self.shear) != (0.0, 0.0, (1.0, 1.0), 0.0)

    @property
    def has_colour(self) -> bool:
        """Whether images may change colour (jitter or grayscale)."""
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        return self.gray_p > 0.0 or (self.jitter_p > 0.0 and any(strengths))


class AugmentationConfig(_Section):
    """Random transforms of both views. Preset: the paper's; ours for digits and image folders."""

    view1: ViewConfig = ViewConfig()
    """Transforms of the first view."""
    view2: ViewConfig = ViewConfig()
    """Transforms of the second view."""


class DataConfig(_Section):
    """Which images to train on, and how to load them."""

    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "tinyimagenet", "imagefolder"] = (
        "imagefolder"
    )
    """Selects the augmentation and stem presets; imagefolder is any folder of images."""
    root: Path = Field(strict=False, json_schema_extra=FREE)
    """Folder with train/CLASS/, val/CLASS/ and optionally unlabeled/; JPEG, PNG, WebP, BMP or TIFF,
    as files or in tars."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Whether files that are unreadable at the start stop the run or are skipped. A file lost later
    always stops it."""
    check: Literal["full", "headers", "off"] = Field("full", json_schema_extra=FREE)
    """How to check new files before the first step: full decodes them, headers reads format and
    size, off opens none. Without full, a damaged file ends the run once reached or crashes DALI."""
    backend: Literal["auto", "dali", "resident"] = Field("auto", json_schema_extra=FREE)
    """dali decodes every batch; resident decodes all images once and keeps them on the device (all
    of one size, no affine transforms). auto: resident if possible and within resident_limit_gb, on
    a GPU or without DALI; else dali. It must not change during a run."""
    resident_limit_gb: float = Field(8.0, gt=0, json_schema_extra=FREE)
    """Memory limit in 10^9 bytes, on each device, for each set of resident images: those for
    training, validation and the k-NN bank."""
    crop: int | None = Field(None, ge=8)
    """Side of the square network input, in pixels; null: the data set's default."""
    augmentation: AugmentationConfig = Field(default_factory=dict, validate_default=True)
    """Random transforms of the views. Preset: those of the data set."""
    threads: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Decoding threads or processes per rank; null: the cores that affinity and a container's CPU
    limit allow, split among the machine's ranks."""
    prefetch: int = Field(2, ge=1, le=16, json_schema_extra=FREE)
    """Batches that dali prepares ahead."""
    stall_seconds: float = Field(300.0, gt=0, json_schema_extra=FREE)
    """Fail instead of hanging if a batch takes longer than this."""

    @field_validator("augmentation", mode="before")
    @classmethod
    def _of_the_data_set(cls, raw: Any, info: ValidationInfo) -> Any:
        preset = VIEWS_OF_DATASET.get(info.data.get("dataset", ""))
        return merge(preset, raw) if preset and isinstance(raw, Mapping) else raw


class EncoderConfig(_Section):
    """The backbone, x_BCHW -> h_BF."""

    name: str = "resnet18"
    """A torchvision ResNet (resnet18, resnet34, resnet50), timm:NAME, or module:function for your
    own function that returns a module. stem, stem_padding and width apply to ResNets only."""
    stem: Literal["cifar", "tiny", "imagenet"] = "imagenet"
    """First layers: cifar is a 3x3 convolution, tiny adds max-pooling, imagenet is 7x7 with stride
    2 and max-pooling. Preset: the paper's for the data set; for image folders cifar up to a
    data.crop of 32, tiny up to 64."""
    stem_padding: int = Field(1, ge=0, le=2)
    """Padding of the 3x3 stems, in pixels; the released code has 2 (34 x 34 maps)."""
    width: int = Field(64, ge=4)
    """Channels of resnet18's or resnet34's first stage; torchvision has 64, fewer are faster."""
    init: str | None = None
    """Initial weights of the same encoder: a run's folder, an encoder.safetensors, or a torchvision
    or timm checkpoint, also within a model, as MoCo, solo-learn and lightly save it. A classifier
    is ignored; a first convolution of another size stays random. Not read when a run is resumed."""

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
    """Hidden units, also of the predictor of byol and simsiam."""
    output: int = Field(256, ge=2)
    """Embedding dimension D."""


class MethodConfig(_Section):
    """Keys of every method; each method adds its own (isofast/methods)."""

    name: str
    """A built-in method, or module:Class for your own. isoloss, directpred and directcopy predict
    with W = f(C), isoloss with the isotropic gradient; byol, simsiam and linear train a predictor;
    sigreg has a different loss and no predictor (docs/guide/runs.md)."""
    ema: bool = False
    """Take targets from an EMA copy of the network; false: use the online embeddings."""
    ema_base: float = Field(0.99, ge=0, le=1)
    """EMA decay of the target network at the first step; rises to 1 along a half cosine. Preset:
    0.99, as in the paper; 0.9 for closed forms with method.correlation's preset of directions."""
    decay: float = Field(0.99, ge=0, lt=1)
    """EMA decay of C, the weight that it keeps at each step."""
    correlation: Literal["embeddings", "directions"] = "embeddings"
    """What C averages: z z^T, as in the paper, or the same of z / |z|, so that long embeddings
    don't dominate (ours; docs/method/first-steps.md). Preset: directions for the cosine loss in
    runs of under 100 epochs and on data sets outside the paper."""


class OptimizerConfig(_Section):
    """Optimizer of the network and of the online probe."""

    name: Literal["lars", "sgd", "adamw"] = "lars"
    """Preset: lars with EMA, else sgd; adamw for sigreg, sgd with method.correlation directions and
    for your own methods."""
    lr: float = Field(1.0, gt=0)
    """Peak learning rate at a global batch of 256; scaled linearly with the batch. Preset: 1.0 for
    lars, 0.001 for adamw, 0.1 for sgd (0.3 for closed forms with method.correlation directions)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of lars and sgd, beta1 of adamw."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay; lars and adamw apply it to parameters with ndim > 1 only. Preset: 1e-4; 1e-5
    for byol, simsiam and your own methods, 0.05 for sigreg."""
    eta: float = Field(0.02, gt=0)
    """Trust coefficient of lars."""
    probe_lr: float = Field(0.1, gt=0)
    """Peak learning rate of the online probe at a global batch of 256, on the same schedule."""


class ScheduleConfig(_Section):
    """Learning-rate schedule: linear warm-up, then a half cosine to 0."""

    warmup_epochs: float | None = Field(None, ge=0)
    """Warm-up epochs; null: 10, or a tenth of a run shorter than 100 epochs."""
    warmup_start: float = Field(3e-5, ge=0)
    """Learning rate at the first step."""


class TrainConfig(_Section):
    """Length, batch size and precision of the run."""

    epochs: int = Field(1000, ge=1)
    """Passes over the training images; also the length of the schedules."""
    max_steps: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Stop after this many steps, without shortening the schedules; raise it to continue."""
    batch_size: int = Field(256, ge=2)
    """Global batch size, split equally among the ranks."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per rank, to save memory: only one micro-batch's activations are kept; they are
    recomputed for the backward pass. Loss, C and target are computed over the whole batch,
    BatchNorm statistics over a micro-batch."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype of the networks; auto: bf16 on a GPU from Ampere on and on a CPU with
    AVX512-BF16 or AMX, else fp32. With fp32, convolutions on a GPU use TF32. Parameters, BatchNorm,
    C and the loss are always fp32."""
    batch_norm: Literal["auto", "local", "synchronised"] = "auto"
    """BatchNorm statistics of each rank or of all ranks; auto: synchronised."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the networks; auto: on a GPU only."""
    cuda_graph: Literal["auto", "on", "off"] = Field("auto", json_schema_extra=FREE)
    """Capture the whole step in one CUDA graph; single process without micro-batches. auto: on a
    GPU, unless the method or encoder is your own (a graph freezes Python values) or method.alpha
    needs an eigendecomposition (all but 0.5, 1, 2, and 0.25 with method.eps of at least 0.1)."""
    on_collapse: Literal["warn", "stop"] = Field("warn", json_schema_extra=FREE)
    """What to do when the embeddings collapse."""


class EvaluationConfig(_Section):
    """Top-1 accuracy of the online probe and of k-NN on clean validation images."""

    every_epochs: int = Field(10, ge=0, json_schema_extra=FREE)
    """Epochs between evaluations, with another at the end; 0: never."""
    at_start: bool = Field(False, json_schema_extra=FREE)
    """Also evaluate before the first step."""
    knn_images: int = Field(5000, ge=1, json_schema_extra=FREE)
    """Maximum number of training images in the k-NN bank."""
    knn_k: int = Field(200, ge=1, le=200, json_schema_extra=FREE)
    """Number of neighbours that vote, at most the size of the bank."""
    knn_temperature: float = Field(0.07, gt=0, json_schema_extra=FREE)
    """Votes are weighted by exp(cosine similarity / temperature)."""
    knn_pixels: bool = Field(False, json_schema_extra=FREE)
    """Also report k-NN on raw pixels at the end; meant for small images."""
    metrics_images: int = Field(1000, ge=0, json_schema_extra=FREE)
    """Validation images for the label-free metrics (docs/method/metrics.md), the same in every run;
    0 disables them."""
    batch_size: int = Field(256, ge=1, json_schema_extra=FREE)
    """Images per forward pass and rank."""


class CheckpointConfig(_Section):
    """When to save checkpoints, besides at the end."""

    every_steps: int = Field(1000, ge=1, json_schema_extra=FREE)
    """Steps between checkpoints."""
    every_minutes: float | None = Field(10.0, gt=0, json_schema_extra=FREE)
    """Also save after this many minutes without a checkpoint; null: by steps only."""
    max_failures: int = Field(3, ge=0, json_schema_extra=FREE)
    """Consecutive checkpoints that may fail, on a full disk, before the run ends."""
    keep: int = Field(2, ge=1, json_schema_extra=FREE)
    """How many of the newest checkpoints to keep, besides the one with the best k-NN accuracy."""


class LoggingConfig(_Section):
    """What to record during the run."""

    every_steps: int = Field(50, ge=1, json_schema_extra=FREE)
    """Steps between records in metrics.jsonl, the training loop's only host syncs."""
    spectrum_every_steps: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Steps between spectra of C in spectrum.npz, besides those at records and epoch ends."""
    loggers: list[str] = Field(["tensorboard"], json_schema_extra=FREE)
    """Loggers besides metrics.jsonl: tensorboard, wandb (must be installed), or module:Class for
    your own (isofast/run/loggers.py)."""

    @field_validator("loggers")
    @classmethod
    def _exist(cls, loggers: list[str]) -> list[str]:
        for name in loggers:
            if name not in ("tensorboard", "wandb") and ":" not in name:
                raise ValueError(
                    f"{name!r} is not a logger; allowed are tensorboard, wandb and module:Class"
                )
        return loggers


class Config(_Section):
    """The complete configuration of a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, the image order and the augmentation."""
    data: DataConfig
    # comes before the sections whose presets depend on it
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
    """Passed through to DeepSpeed; must not set keys that isofast derives."""

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
            # as JSON, whose lists pydantic also accepts for a custom class's tuples
            return config_class.model_validate_json(json.dumps(tree, default=str))
        return raw

    @property
    def warmup_epochs(self) -> float:
        """Warm-up epochs, with null resolved."""
        given = self.schedule.warmup_epochs
        return min(10.0, self.train.epochs / 10) if given is None else given

    def batch_size_per_rank(self, world_size: int) -> int:
        """Return the number of images per rank in a step.

        Raises:
            UserError: the global batch is not divisible by ``world_size`` times the micro-batches,
                or leaves one a single image, which has no batch statistics.
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
    # unlike model_dump_json, json writes any path
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def schema_json() -> str:
    """Return the JSON schema of a config file, as shipped in launch/config.schema.json."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    of_your_own = definitions.pop("MethodConfig")
    of_your_own |= {"title": "Your own class", "additionalProperties": True}
    of_your_own["properties"]["name"]["pattern"] = ":"
    definitions["module:Class"] = of_your_own
    for name in METHODS:
        built_in = method_class(name)
        definitions[name] = built_in.Config.model_json_schema()
        definitions[name]["description"] = inspect.getdoc(built_in.__dict__.get("Config", built_in))
        definitions[name]["properties"]["name"] = {"const": name, "description": "The method."}
        definitions[name]["required"].remove("name")
    refs = [{"$ref": f"#/$defs/{name}"} for name in (*METHODS, "module:Class")]
    schema["properties"]["method"] = {"anyOf": refs}
    schema["properties"][SCHEMA_KEY] = {"type": "string", "description": "Schema for editors."}
    return json.dumps(schema, indent=2) + "\n"


def changed_keys(old: Config, new: Config, *, free: bool = False) -> list[str]:
    """Return the differences between two configs that affect results, as ``key: old -> new``.

    With ``free``, also those that do not.
    """
    before, after = dict(leaves(old, free=free)), dict(leaves(new, free=free))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def leaves(model: BaseModel, prefix: str = "", *, free: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield every key that affects results, or with ``free`` every key, with its value."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.", free=free)
        elif free or field.json_schema_extra != FREE:
            yield f"{prefix}{name}", value
