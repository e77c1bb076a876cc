"""What the tools share: arguments and their checks, models and images by name, and one way to end with an error."""

from .arguments import (
    MAX_SIDE,
    add_models_argument,
    add_output_arguments,
    check_device,
    check_names,
    check_out_dir,
    check_writable,
    make_out_dir,
    parse_size,
)
from .errors import UserError, run_tool
from .images import (
    as_rgb,
    image_channels,
    list_images,
    list_samples,
    normalize,
    preprocessing,
    pyplot,
    read_image,
    resize_and_crop,
)
from .models import NO_CHECKPOINT, load_model, read_config, require_vmamba

__all__ = [
    'MAX_SIDE',
    'NO_CHECKPOINT',
    'UserError',
    'add_models_argument',
    'add_output_arguments',
    'as_rgb',
    'check_device',
    'check_names',
    'check_out_dir',
    'check_writable',
    'image_channels',
    'list_images',
    'list_samples',
    'load_model',
    'make_out_dir',
    'normalize',
    'parse_size',
    'preprocessing',
    'pyplot',
    'read_config',
    'read_image',
    'require_vmamba',
    'resize_and_crop',
    'run_tool',
]
