"""The former name of `workers.builtin.models`, which scripts import."""

import sys

from workers.builtin import models

sys.modules[__name__] = models
