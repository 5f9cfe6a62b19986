"""What Triton's interpreter lacks.

Its scalars are arrays of one element, which NumPy no longer takes for the numbers that loops over `range` need. And it
keeps bf16 as 16-bit integers, which it multiplies as such.
"""

from importlib.util import find_spec

if find_spec("triton"):
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor
    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _patch_tensor_with_numbers(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _create_dot_of_values(self, a, b, d, *how):
        return _create_dot(self, _values(a), _values(b), d, *how)

    def _values(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = _patch_tensor_with_numbers
    interpreter.InterpreterBuilder.create_dot = _create_dot_of_values
