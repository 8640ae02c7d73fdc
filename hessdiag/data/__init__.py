"""Named data sets and files become batches."""

from hessdiag.data.dataset import Batches, DataSet
from hessdiag.data.fetch import default_root, fetch
from hessdiag.data.load import load, load_named
from hessdiag.data.named import NamedDataSet

__all__ = ["Batches", "DataSet", "NamedDataSet", "default_root", "fetch", "load", "load_named"]
