"""python -m sdq.cli"""

import sys

from sdq.cli import main

sys.exit(main())
