"""What Triton's interpreter lacks.

Its scalars are arrays of one element, which NumPy no longer takes for the numbers that loops over `range` need. It
keeps bf16 as 16-bit integers, which it multiplies as such. And half of its time is for nothing: at every call of a
device function it looks through the whole language for what to replace, though the launch of the kernel has replaced
it, and every sum and product of integers is computed again in 64 bits for an assertion that is off.
"""

from importlib.util import find_spec

if find_spec("triton"):
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor
    _patch_lang = interpreter._patch_lang
    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _patch_tensor_with_numbers(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _patch_lang_once(fn):
        langs = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        whole = langs and not any(tl.core.is_builtin(lang.arange) for lang in langs)
        return interpreter._LangPatchScope() if whole else _patch_lang(fn)

    def _create_dot_of_values(self, a, b, d, *how):
        return _create_dot(self, _values(a), _values(b), d, *how)

    def _values(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = _patch_tensor_with_numbers
    interpreter._patch_lang = _patch_lang_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.InterpreterBuilder.create_dot = _create_dot_of_values
