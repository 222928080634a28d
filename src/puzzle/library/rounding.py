"""Matrices in the types of GGUF files: rounded as llama.cpp rounds them, and read back as it reads them.

A twin computes what an engine reads: its matrices are rounded, so that torch multiplies the very values of the file.
The error of an input channel is weighed by its mean square E[x^2] in the calibration text, llama.cpp's importance
matrix, where that is known: of a matrix that reads the subblock's normed input, and of a parent's down projection.

Shapes: O outputs, I inputs of a matrix, R bytes of a row.
"""

import ctypes
from functools import cache

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from puzzle.engines.environments import python_of
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.variants import State, Variant

ROUNDED = "rounded.ggml"
"""In a child's folder: the bytes of its rounded matrices by their names, a safetensors file."""


def encode(matrix_OI: Tensor, type: str, importance_I: Tensor | None = None) -> Tensor:
    """The bytes of a matrix, uint8 [O, R]; a `PuzzleError` if llama.cpp is needed for the type, and not installed."""
    kind, values_OI = GGMLQuantizationType[type.upper()], matrix_OI.float().contiguous().cpu().numpy()
    if importance_I is None:
        try:
            return torch.from_numpy(gguf.quantize(values_OI, kind))
        except NotImplementedError:  # K and IQ types
            pass
    rows, columns = values_OI.shape
    bytes_OR = np.empty(gguf.quant_shape_to_byte_shape(values_OI.shape, kind), np.uint8)
    weights_I = None if importance_I is None else importance_I.float().contiguous().cpu().numpy()
    source, target, weights = (each if each is None else each.ctypes.data for each in (values_OI, bytes_OR, weights_I))
    written = _ggml().ggml_quantize_chunk(int(kind), source, target, 0, rows, columns, weights)
    assert written == bytes_OR.nbytes, f"{type}: {written} bytes for {bytes_OR.nbytes}"
    return torch.from_numpy(bytes_OR)


def decode(bytes_OR: Tensor, type: str) -> Tensor:
    """The values that an engine reads, float32 [O, I]."""
    return torch.from_numpy(gguf.dequantize(bytes_OR.numpy(), GGMLQuantizationType[type.upper()]))


def encode_state(variant: Variant, state: State, moments: State, config: PuzzleConfig) -> State:
    """The bytes of a twin's matrices, from its variant's weights and the subblock's calibration moments, if any."""
    output, bytes_of = variant.output_projection(config), State()
    for name, value in state.items():
        if value.ndim > 1:
            moment = "activation_second_moment" if name == f"{output}.weight" else "input_second_moment"
            known = moments.get(moment)
            fits = known is not None and known.shape[0] == value.shape[1]
            bytes_of[name] = encode(value, variant.type, known.diagonal() if known is not None and fits else None)
    return bytes_of


@cache
def _ggml() -> ctypes.CDLL:
    """llama.cpp's library of types."""
    folder = python_of("llama.cpp").parent.parent
    files = [*folder.glob("lib/python*/site-packages/llama_cpp/lib/libggml-base.*")]
    if not files:
        raise PuzzleError(f"space.types: {folder} has no libggml-base; `puzzle engines install llama-cpp` mends it")
    library, pointer, size = ctypes.CDLL(str(files[0])), ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
