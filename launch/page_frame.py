"""What all pages share: how templates are read, and how they write numbers. Torch-free."""

from __future__ import annotations

from pathlib import Path

import jinja2

from launch import quantities
from launch.canvas import model_role


def page_template(name: str) -> jinja2.Template:
    """A template of this package; a name that it is not given when it is rendered is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters.update(
        scaled=quantities.scaled,
        num_bytes=quantities.num_bytes,
        decimals=quantities.decimals,
        ratio=quantities.ratio,
        percent=quantities.percent,
        duration=quantities.duration,
        serving=quantities.serving,
        signed_percent=quantities.signed_percent,
        significant=quantities.significant,
        model_role=model_role,
    )
    return made.get_template(name)
