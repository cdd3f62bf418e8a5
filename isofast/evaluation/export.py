"""Export of encoders to the formats of other libraries."""

import contextlib
import importlib.util
import io
import json
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from isofast.config.schema import EncoderConfig
from isofast.data import Recipe
from isofast.data.files import check_output, read_json, write_atomically
from isofast.errors import RunError, UserError
from isofast.evaluation.encoders import Encoder, read_encoder, torch_bytes
from isofast.methods.networks import STAGES
from isofast.methods.weights import describe

_ONNX_TOLERANCE = 1e-4


def export(source: Path, kind: str, output: Path) -> str:
    """Write an encoder without a classifier, atomically; return the code that loads it.

    Args:
        source: a run or a file, as for `load_encoder`.
        kind: safetensors, torchvision, timm, onnx or huggingface.
        output: a file, or a new folder for huggingface. torchvision and timm write a torch.save
            file, or safetensors if the name ends in .safetensors.

    Raises:
        UserError: there is no encoder, the format cannot hold it, its library is not installed, or
            ``output`` cannot be written.
        RunError: the ONNX model's output differs from the encoder's.
    """
    check_output(output)
    if kind == "huggingface" and output.exists():
        raise UserError(f"--output {output} exists; huggingface needs the name of a new folder")
    if kind == "safetensors" and output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the name must end in .safetensors, to be recognised")
    encoder = read_encoder(source)
    config = encoder.config
    if kind == "onnx":
        return _onnx(encoder, output)
    if kind == "huggingface":
        return _huggingface(encoder, output)
    if kind == "timm":
        name = _timm_name(config)
        loading = f'timm.create_model("{name}", num_classes=0, checkpoint_path="{output}")'
    elif kind == "torchvision":
        if ":" in config.name:
            raise UserError(
                f"{config.name} is not one of torchvision's models; export it as safetensors or "
                "onnx" + (", timm or huggingface" if config.name.startswith("timm:") else "")
            )
        loading = _torchvision_code(config, output)
    else:
        loading = f'isofast.load_encoder("{output}")'
    tensors = {name: t.contiguous() for name, t in encoder.module.state_dict().items()}
    if kind == "safetensors" or output.suffix == ".safetensors":
        # only their owner can read save_file's files
        content = save(tensors, describe(config, encoder.recipe))
    else:
        content = torch_bytes(tensors)
    write_atomically(output, lambda part: part.write_bytes(content))
    return f"{loading}\n# {_images(encoder.recipe)}"


def _huggingface(encoder: Encoder, output: Path) -> str:
    _require("timm")
    import timm
    from timm.models import save_for_hf

    module, config, recipe = encoder
    model = timm.create_model(_timm_name(config), num_classes=0)
    model.load_state_dict(module.state_dict())
    card: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    # these describe timm's own weights
    for key in (
        *("tag", "license", "origin_url", "url", "hf_hub_id", "paper_ids"),
        *("test_input_size", "test_crop_pct"),
    ):
        card.pop(key, None)
    card |= {
        "input_size": (3, recipe.crop, recipe.crop),
        "crop_pct": recipe.crop / recipe.resize_short,
        "interpolation": "bicubic",
        "mean": recipe.mean,
        "std": recipe.std,
    }
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        part = Path(folder, "part")
        try:
            save_for_hf(
                model, str(part), model_config={"pretrained_cfg": card}, safe_serialization=True
            )
        # raised on a full disk
        except SafetensorError as error:
            raise RunError(f"could not write {output}: {error}") from error
        # transformers passes this argument itself
        written = read_json(part / "config.json")
        written.get("model_args", {}).pop("num_classes", None)
        (part / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(part / "config.json", part / "model.safetensors")
        part.rename(output)
    return f'timm.create_model("local-dir:{output}", pretrained=True, num_classes=0)'


@torch.no_grad()
def _onnx(encoder: Encoder, output: Path) -> str:
    _require("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    module, side = encoder.module, encoder.recipe.crop
    # torch prints, and warns about its own internals
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            module,
            # a batch size of one would become a constant
            (torch.zeros(2, 3, side, side),),
            input_names=["x"],
            output_names=["h"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    about = describe(encoder.config, encoder.recipe)
    # of the state dict
    del about["format"]
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    model = proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    errors = []
    for batch in (1, 3):
        x_BCHW = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        h_BF: Tensor = module(x_BCHW)
        (got_BF,) = session.run(None, {"x": x_BCHW.numpy()})
        errors.append((torch.from_numpy(got_BF) - h_BF).abs().max() / h_BF.abs().max())
    worst = torch.stack(errors).max().item()
    differ = f"onnxruntime's features differ from torch's by {worst:.1e} of the largest feature"
    if not worst <= _ONNX_TOLERANCE:
        raise RunError(f"{differ}; {output} was not written")
    write_atomically(output, lambda part: part.write_bytes(model))
    return (
        f'onnxruntime.InferenceSession("{output}").run(None, {{"x": x_BCHW}})\n'
        f"{_images(encoder.recipe)}; h: (B, F). {differ}"
    )


def _images(recipe: Recipe) -> str:
    return (
        f"x: (B, 3, {recipe.crop}, {recipe.crop}) float32, (pixels / 255 - mean) / std with mean "
        f"{recipe.mean} and std {recipe.std}"
    )


def _torchvision_code(config: EncoderConfig, output: Path) -> str:
    """Return Python code that loads torchvision's state dict into ``net``."""
    width, pad = config.width, config.stem_padding
    side, stride, padding = (7, 2, 3) if config.stem == "imagenet" else (3, 1, pad)
    lines = [
        "import torch, torchvision",
        f"net = torchvision.models.{config.name}()",
        "net.fc = torch.nn.Identity()",
    ]
    if config.stem != "imagenet" or width != 64:
        lines.append(
            f"net.conv1 = torch.nn.Conv2d(3, {width}, {side}, {stride}, {padding}, bias=False)"
        )
    if config.stem == "cifar":
        lines.append("net.maxpool = torch.nn.Identity()")
    if width != 64:
        lines += [
            f"net.bn1, net.inplanes = torch.nn.BatchNorm2d({width}), {width}",
            "Block = torchvision.models.resnet.BasicBlock",
            *(
                f"net.layer{k + 1} = net._make_layer(Block, {width << k}, {blocks}, "
                f"stride={min(k + 1, 2)})"
                for k, blocks in enumerate(STAGES[config.name])
            ),
        ]
    if output.suffix == ".safetensors":
        lines += [
            "from safetensors.torch import load_file",
            f'net.load_state_dict(load_file("{output}"))',
        ]
    else:
        lines.append(f'net.load_state_dict(torch.load("{output}"))')
    return "\n".join(lines)


def _timm_name(config: EncoderConfig) -> str:
    """Return timm's name of the model; timm's ResNets have torchvision's names and layers."""
    if config.name.startswith("timm:"):
        return config.name.removeprefix("timm:")
    if ":" in config.name:
        raise UserError(f"{config.name} is not a timm model; export it as safetensors or onnx")
    if config.stem != "imagenet" or config.width != 64:
        raise UserError(
            f"timm's {config.name} starts with a 7 x 7 convolution of 64 channels; this encoder "
            f"has stem {config.stem} and width {config.width}. Export it as torchvision (which "
            f"prints the code that adapts the model), safetensors or onnx; timm needs "
            f"encoder.stem=imagenet and encoder.width=64"
        )
    return config.name


def _require(*packages: str) -> None:
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"this format needs {', '.join(missing)}: pip install --upgrade {' '.join(missing)}"
        )
