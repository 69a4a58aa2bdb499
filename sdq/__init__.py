"""sdq: 4-bit video diffusion transformers in pure JAX."""

import importlib.metadata

from sdq.checkpoint import load as load
from sdq.checkpoint import save as save
from sdq.exported import export as export
from sdq.exported import load_export as load_export
from sdq.formats import Format as Format
from sdq.formats import parse as format
from sdq.leaf_table import leaf_table as leaf_table
from sdq.manifest import CheckpointError as CheckpointError
from sdq.metrics import sqnr_db as sqnr_db
from sdq.qtensor import QTensor as QTensor
from sdq.qtensor import shardings as shardings
from sdq.qtensor import validate as validate
from sdq.quantize import dequantize as dequantize
from sdq.quantize import fake_quantize as fake_quantize
from sdq.quantize import quantize as quantize
from sdq.quantize import to_fp8 as to_fp8
from sdq.rules import Plan as Plan
from sdq.rules import Rule as Rule
from sdq.rules import resolve as resolve
from sdq.tree import LeafReport as LeafReport
from sdq.tree import dequantize_params as dequantize_params
from sdq.tree import progress_bar as progress_bar
from sdq.tree import quantize_params as quantize_params

__all__ = [
    "CheckpointError",
    "Format",
    "LeafReport",
    "Plan",
    "QTensor",
    "Rule",
    "dequantize",
    "dequantize_params",
    "export",
    "fake_quantize",
    "format",
    "leaf_table",
    "load",
    "load_export",
    "progress_bar",
    "quantize",
    "quantize_params",
    "resolve",
    "save",
    "shardings",
    "sqnr_db",
    "to_fp8",
    "validate",
]
__version__ = importlib.metadata.version("sdq")
