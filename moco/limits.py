"""How long processes wait for each other, in seconds: all limits of a run, also listed in docs/reliability.md."""

JOIN_SECONDS = 300  # at the start, for ranks that are not there yet; torchrun has limits of its own
COLLECTIVE_SECONDS = 900  # in a step, for a rank that is cut off, or waits for its data: gloo's and NCCL's own limit
DATA_SECONDS = 600  # for a batch, after which the run is saved and ends; less than COLLECTIVE_SECONDS
LISTING_SECONDS = 600  # for the list of files that the first process of a node makes; then each lists for itself
GRACE_SECONDS = 30  # for spawned ranks to save once one of them has failed; torchrun and Slurm give 30 s, too
LOADERS_END_SECONDS = 5  # for the loading processes, when a script ends
PARENT_SECONDS = 1  # between two looks at whether torchrun is still there
