"""Values of options that several commands of the command line share."""

from __future__ import annotations

import enum


class Size(str, enum.Enum):
    tiny = "tiny"
    full = "full"


class Dtype(str, enum.Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class TableFormat(str, enum.Enum):
    text = "text"
    markdown = "markdown"
