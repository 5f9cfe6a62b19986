"""Triton's interpreter under a NumPy that no longer takes an array of one element for a number.

Every scalar of the interpreter is such an array, and loops over `range` of scalars need the number.
"""

from importlib.util import find_spec

if find_spec("triton"):
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_numbers(tensor, scope):
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_numbers
