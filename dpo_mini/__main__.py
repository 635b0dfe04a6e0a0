import sys

from dpo_mini.cli import main

sys.exit(main())
