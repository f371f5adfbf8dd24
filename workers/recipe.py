"""The former name of `workers.builtin.builders`, which scripts import."""

import sys

from .builtin import builders

sys.modules[__name__] = builders
