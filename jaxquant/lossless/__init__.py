"""Lossless coding: files that are stored in fewer bytes and come back bit for bit."""

from jaxquant.lossless.archive_format import Section
from jaxquant.lossless.archive_read import read_head
from jaxquant.lossless.byte_planes import Record
from jaxquant.lossless.files import compress_file, decompress_file

__all__ = ["Record", "Section", "compress_file", "decompress_file", "read_head"]
