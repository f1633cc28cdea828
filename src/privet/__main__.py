"""`python -m privet`: the same as the command `privet`."""

from privet.common.cli import main

main()
