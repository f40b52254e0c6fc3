"""Raw layouts: one file each, one line each here. `detect` is asked in this order."""

from data_tools.sources.chaos import ChaosSource
from data_tools.sources.dicom import DicomSource
from data_tools.sources.folders import BidsSource, ClassFilesSource, FolderSource
from data_tools.sources.listed import DatalistSource, MsdSource
from data_tools.sources.nnunet import NnunetSource
from data_tools.sources.patterns import PatternSource
from data_tools.sources.raw import Source

SOURCES: dict[str, Source] = {
    "nnunet": NnunetSource(),
    "msd": MsdSource(),
    "datalist": DatalistSource(),
    "classfiles": ClassFilesSource(),
    "bids": BidsSource(),
    "folder": FolderSource(),
    "chaos": ChaosSource(),
    "dicom": DicomSource(),
    "pattern": PatternSource(),
}
