"""A small part of the demo's data, for tests that train in seconds."""
from __future__ import annotations

import json
from pathlib import Path

from qa.data.demo import write_demo


def write_small_demo(folder: Path, train: int, validation: int,
                     version_2_with_negative: bool = False) -> None:
    """Write the demo's model and data into `folder`, with that many paragraphs in each file."""
    write_demo(folder, seed=5, version_2_with_negative=version_2_with_negative)
    for name, paragraphs in (("train", train), ("validation", validation)):
        path = folder / f"{name}.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        (article,) = data["data"]
        article["paragraphs"] = article["paragraphs"][:paragraphs]
        path.write_text(json.dumps(data), encoding="utf-8")
