"""The former name of `paramserver.protocol.messages`, which scripts import."""

import sys

from paramserver.protocol import messages

sys.modules[__name__] = messages
