"""Lossless coding: weights, arrays and whole files in fewer bytes, which come back bit for bit."""

from jaxquant.lossless.archive_format import Section
from jaxquant.lossless.archive_read import read_head
from jaxquant.lossless.arrays import decode_array, encode_array
from jaxquant.lossless.byte_planes import Record
from jaxquant.lossless.files import compress_file, decompress_file
from jaxquant.lossless.forms import method
from jaxquant.lossless.tensors import decode, encode

__all__ = [
    "Record",
    "Section",
    "compress_file",
    "decode",
    "decode_array",
    "decompress_file",
    "encode",
    "encode_array",
    "method",
    "read_head",
]
