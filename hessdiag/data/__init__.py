"""Named data sets and files become batches."""

from hessdiag.data.dataset import Batches, DataSet
from hessdiag.data.fetch import default_root, fetch
from hessdiag.data.load import load

__all__ = ["Batches", "DataSet", "default_root", "fetch", "load"]
