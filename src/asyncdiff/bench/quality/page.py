"""The result as one self-contained HTML page: plots, pictures, tables, machine, versions, command."""

from __future__ import annotations

import base64
import io

from asyncdiff.bench.quality.plots import plots
from asyncdiff.bench.quality.results import QualityResult
from asyncdiff.bench.quality.tables import facts, tables
from asyncdiff.bench.runs.page import document
from asyncdiff.bench.runs.plots import data_uri


def page(result: QualityResult) -> str:
    """The document. Nothing in it is fetched from elsewhere."""
    images = {name: data_uri(figure) for name, figure in plots(result).items()}
    written = io.BytesIO()
    result.grid.save(written, format="PNG")
    picture = base64.b64encode(written.getvalue()).decode("ascii")
    images["Pictures, and their difference from in order"] = f"data:image/png;base64,{picture}"
    return document(f"asyncdiff quality: {result.title}", images, tables(result), facts(result))
