"""The former name of `workers.builtin.models`, which scripts import."""

import sys

from .builtin import models

sys.modules[__name__] = models
