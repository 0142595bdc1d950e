"""Triton's interpreter beside versions of NumPy that are newer than it.

Triton 3.6 takes the bounds of a loop by `int(array)` from arrays of one element and one dimension: an error with NumPy
2.4 and later, and a warning before. Triton 3.7 takes them from the element, and so does 3.6 after `mend`.
"""

from importlib.metadata import PackageNotFoundError, version


def mend():
    """In this process, and only where Triton is 3.6 or older."""
    try:
        release = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return
    if release < (3, 7):
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patch_with_index(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch_with_index
