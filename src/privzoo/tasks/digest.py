"""A digest of a table's content: blind to how it lies in memory, to nothing else."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def content_digest(table: pa.Table, settings: str) -> str:
    """sha256 (hex) of the rows of a checked table, in order, and of `settings`.

    Equal tables give equal digests however they are sliced or cut into chunks. A changed character, label, pixel,
    order, column name or setting changes it: lengths are hashed beside the bytes, so that text cannot move
    between neighbouring rows unseen.
    """
    digest = hashlib.sha256(settings.encode())
    for name, array in zip(table.column_names, table.columns, strict=True):
        digest.update(f"\0{name}\0{array.type}\0{len(array)}\0".encode())
        chunks = [chunk for chunk in array.chunks if len(chunk)]
        if pa.types.is_large_list(array.type):
            for chunk in chunks:
                digest.update(pc.list_value_length(chunk).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            array = pc.list_flatten(array)
            chunks = array.chunks
        if pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
            for chunk in chunks:
                digest.update(pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            for chunk in chunks:
                digest.update(_string_bytes(chunk))
        elif isinstance(array.type, pa.FixedShapeTensorType):
            for chunk in chunks:
                digest.update(chunk.storage.flatten().to_numpy().tobytes())
        else:
            for chunk in chunks:
                digest.update(chunk.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def _string_bytes(chunk: pa.Array) -> memoryview:
    """The bytes of all cells, one after another. The buffers of a slice are those of its parent: cut them."""
    _, offsets, data = chunk.buffers()
    if data is None:
        return memoryview(b"")
    bounds = np.frombuffer(offsets, dtype=np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
    return memoryview(data)[bounds[0] : bounds[1]]
