"""The published set as files: tensors as stored, decoded images ready for any trainer, and a card that says how it was made."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import JsonValue
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ncfm_core.catalog import DatasetFacts
from ncfm_core.errors import StorageError
from ncfm_core.synthetic import SyntheticSet

FORMAT_VERSION = 1
ZIP_DATE = (2000, 1, 1, 0, 0, 0)
"""Fixed, so that equal sets give equal files."""

CARD = """\
# {title}, distilled to {ipc} image{plural} per class

{count} stored images ({factor}x{factor} tiles each, {decoded} training images once decoded), made by NCFM
(neural characteristic function matching) with seed {seed}.{note}

![the stored images and what they decode to](preview.png)

| trained on | test accuracy (last epoch, mean and std over students) |
|---|---|
{rows}

## Load it

```python
{loading}
```

`images` are float32 in [0, 1]. Or `torchvision.datasets.ImageFolder` on the unpacked `imagefolder.zip`
(`train/<class>/*.png`), or `datasets.load_dataset("parquet", data_files="train.parquet")`: both hold the decoded images.

## Train on it

This is the protocol of the figures above, without its CutMix, in plain PyTorch; `images` and `labels` are those of the
snippet above. A single student strays by a point or two: compare the mean of a few.

```python
{recipe}
```

`manifest.json` has the spec, the seeds, the digests and the versions behind this set.
"""

LOADING = """\
import torch
from safetensors.torch import load_file

images = load_file("images.safetensors")["images"]  # {shape}
labels = load_file("labels.safetensors")["labels"]
tiles = [part for half in images.tensor_split({factor}, 2) for part in half.tensor_split({factor}, 3)]
images = torch.cat([torch.nn.functional.interpolate(tile, {size}, mode="bilinear") for tile in tiles])
labels = labels.repeat({tiles})"""
SOFT_LOADING = """
soft_labels = load_file("labels.safetensors")["soft_labels"]  # teacher logits of each tile, {soft_shape}
soft_labels = soft_labels.unflatten(0, (-1, {tiles})).transpose(0, 1).flatten(0, 1)"""


def export_files(
    synthetic: SyntheticSet, facts: DatasetFacts, provenance: Mapping[str, JsonValue], card: str
) -> dict[str, bytes]:
    """All files of the published set, by name; the same set and provenance give the same bytes.

    Args:
        synthetic: the set, on the CPU.
        facts: the catalog's entry of the data it was made from.
        provenance: spec, digests, seeds, versions, figures: goes into the manifest as it is.
        card: `README.md`, from `data_card`.
    """
    images, labels = synthetic.decode()
    pixels = images.detach().mul(255).round().clamp(0, 255).to(torch.uint8)
    pngs = [png(image) for image in pixels]
    return {
        "images.safetensors": save_tensors({"images": synthetic.images.detach().contiguous()}, _metadata(synthetic)),
        "labels.safetensors": save_tensors(_labels(synthetic)),
        "manifest.json": _json(_manifest(synthetic, facts, provenance)),
        "preview.png": png(synthetic.preview()),
        "README.md": card.encode(),
        "imagefolder.zip": _imagefolder(pngs, labels, facts),
        "train.parquet": _parquet(pngs, labels, facts),
    }


def png(image: Tensor) -> bytes:
    """A PNG of uint8 pixels of shape (channels, H, W), one channel or three."""
    pixels = image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def load_export(files: Mapping[str, bytes]) -> SyntheticSet:
    """The set back from its `images.safetensors` and `labels.safetensors`.

    Raises:
        StorageError: one of them or the factor is missing.
    """
    try:
        data = files["images.safetensors"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        factor = int(json.loads(header["__metadata__"]["set"])["factor"])
        labels = load_tensors(files["labels.safetensors"])
        return SyntheticSet(load_tensors(data)["images"], labels["labels"], factor, labels.get("soft_labels"))
    except KeyError as error:
        raise StorageError.of("files", error.args[0], "missing from the exported set", "Export it again.") from None


def data_card(
    synthetic: SyntheticSet, facts: DatasetFacts, *, seed: int, rows: str, recipe: str, note: str = ""
) -> str:
    """The `README.md` of a set.

    Args:
        synthetic: the set.
        facts: the catalog's entry of its data.
        seed: of the job.
        rows: lines of the accuracy table.
        recipe: source of a script that trains one student, without this package.
        note: a sentence about how it was made; empty for none.
    """
    channels, height, width = synthetic.images.shape[1:]
    count, factor = len(synthetic.images), synthetic.factor
    return CARD.format(
        title=facts.title,
        ipc=synthetic.ipc,
        plural="" if synthetic.ipc == 1 else "s",
        count=count,
        factor=factor,
        decoded=count * factor**2,
        seed=seed,
        note=f"\n\n{note}" if note else "",
        rows=rows,
        loading=(LOADING if synthetic.soft_labels is None else LOADING + SOFT_LOADING).format(
            shape=(count, channels, height, width),
            factor=factor,
            size=(height, width),
            tiles=factor**2,
            soft_shape=() if synthetic.soft_labels is None else tuple(synthetic.soft_labels.shape),
        ),
        recipe=recipe,
    )


def _labels(synthetic: SyntheticSet) -> dict[str, Tensor]:
    tensors = {"labels": synthetic.labels.contiguous()}
    if synthetic.soft_labels is not None:
        tensors["soft_labels"] = synthetic.soft_labels.contiguous()
    return tensors


def _metadata(synthetic: SyntheticSet) -> dict[str, str]:
    # One entry: safetensors writes several in an order of chance, and equal sets would give unequal files.
    return {"set": json.dumps({"format": FORMAT_VERSION, "space": "unit", "factor": synthetic.factor}, sort_keys=True)}


def _manifest(
    synthetic: SyntheticSet, facts: DatasetFacts, provenance: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    return {
        "format": FORMAT_VERSION,
        "dataset": facts.name,
        "ipc": synthetic.ipc,
        "classes": list(facts.class_names),
        "images": {
            "file": "images.safetensors",
            "shape": list(synthetic.images.shape),
            "dtype": "float32",
            "space": "unit: pixels in [0, 1]",
        },
        "labels": {"file": "labels.safetensors", "dtype": "int64"},
        "soft_labels": None
        if synthetic.soft_labels is None
        else {
            "file": "labels.safetensors",
            "shape": list(synthetic.soft_labels.shape),
            "dtype": "float32",
            "what": "logarithm of the teachers' mean probability of each class, for every decoded image; the tiles of an image "
            "follow each other",
        },
        "decode": {
            "factor": synthetic.factor,
            "how": "cut each image into factor x factor tiles, row by row; enlarge each bilinearly (align_corners false) to the "
            "full size; every tile has its image's label",
        },
        "normalise": {"mean": list(facts.mean), "std": list(facts.std)},
        "provenance": dict(provenance),
    }


def _json(value: JsonValue) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _imagefolder(pngs: list[bytes], labels: Tensor, facts: DatasetFacts) -> bytes:
    """`train/<class>/<number>.png`; class folders sort in the order of the labels, as ImageFolder wants it."""
    folders = class_folders(facts.class_names)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (png, label) in enumerate(zip(pngs, labels.tolist(), strict=True)):
            entry = zipfile.ZipInfo(f"train/{folders[label]}/{number:06d}.png", ZIP_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, png)
    return buffer.getvalue()


def class_folders(names: tuple[str, ...]) -> tuple[str, ...]:
    """A folder name for each class; numbered where their own names would sort into another order than the labels'."""
    return names if list(names) == sorted(names) else tuple(f"{i:04d}-{name}" for i, name in enumerate(names))


def _parquet(pngs: list[bytes], labels: Tensor, facts: DatasetFacts) -> bytes:
    """Columns `image` and `label`, with the features that `datasets.load_dataset` reads."""
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": list(facts.class_names)},
    }
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    images = [{"bytes": png, "path": f"{number:06d}.png"} for number, png in enumerate(pngs)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": labels.tolist()}, schema=schema), buffer)
    return buffer.getvalue()
