"""Writes what `tfds build` would: a small image set, so that no test needs a network."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_FEATURES = "tensorflow_datasets.core.features"


class Record(NamedTuple):
    image: np.ndarray  # uint8[height, width, channels]
    label: int
    id: str | None = None


def records(count: int, shape: tuple[int, ...] = (4, 5, 3), classes: int = 3) -> list[Record]:
    """Random images without ids."""
    rng = np.random.default_rng(count)
    return [Record(rng.integers(0, 256, shape, dtype=np.uint8), i % classes) for i in range(count)]


def write(
    data_dir: Path,
    splits: Mapping[str, Sequence[Record]],
    *,
    name: str = "tiny",
    config: str = "",
    version: str = "1.0.0",
    classes: int = 3,
    labels: Sequence[str] = ("label",),
    file_format: str = "array_record",
    channels: int = 3,
) -> Path:
    """Prepares a set under `data_dir` and returns the directory of its version."""
    from array_record.python import array_record_module

    directory = data_dir / name / config / version
    directory.mkdir(parents=True)
    infos = []
    for split, rows in splits.items():
        file = directory / f"{name}-{split}.{file_format}-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for row in rows:
            writer.write(_serialized(row, labels))
        writer.close()
        infos.append({"name": split, "shardLengths": [str(len(rows))], "numBytes": "1"})
    info: dict[str, Any] = {"name": name, "version": version, "splits": infos}
    info["fileFormat"] = file_format
    with_ids = any(row.id is not None for rows in splits.values() for row in rows)
    (directory / "dataset_info.json").write_text(json.dumps(info))
    features = _features(classes, labels, with_ids, channels)
    (directory / "features.json").write_text(json.dumps(features))
    return directory


def _serialized(row: Record, labels: Sequence[str]) -> bytes:
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    data = io.BytesIO()
    Image.fromarray(row.image.squeeze()).save(data, "PNG")
    example = proto.Example()
    example.features.feature["image"].bytes_list.value.append(data.getvalue())
    for label in labels:
        example.features.feature[label].int64_list.value.append(row.label)
    if row.id is not None:
        example.features.feature["id"].bytes_list.value.append(row.id.encode())
    return example.SerializeToString()


def _features(classes: int, labels: Sequence[str], with_ids: bool, channels: int) -> dict[str, Any]:
    features: dict[str, Any] = {
        "image": {
            "pythonClassName": f"{_FEATURES}.image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", str(channels)]}},
        }
    }
    for label in labels:
        features[label] = {
            "pythonClassName": f"{_FEATURES}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(classes)},
        }
    if with_ids:
        features["id"] = {"pythonClassName": f"{_FEATURES}.text_feature.Text", "text": {}}
    return {
        "pythonClassName": f"{_FEATURES}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
