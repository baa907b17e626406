"""Train a drafter from the command line: ``python -m dspark_lab.training --help``."""

from dspark_lab.training.loop import main

main()
