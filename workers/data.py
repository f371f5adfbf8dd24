"""The former name of `workers.builtin.data`, which scripts import."""

import sys

from .builtin import data

sys.modules[__name__] = data
