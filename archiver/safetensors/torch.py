"""`safetensors.torch` for packed files and plain ones; `save` and `save_file` take `level=` and `threads=` too."""

from tzip.safetensors.standin import stand_in

globals().update({name: value for name, value in stand_in("torch").items() if not name.startswith("__")})
