"""The executor: models, operators and devices. The first of our packages that imports torch."""

from stages.torch_backends import forbid_autoload

forbid_autoload()
