import sys

from .schedule import main

sys.exit(main())
