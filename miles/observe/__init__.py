"""What a run shows and leaves behind.

    record        the run directory: settings, metrics, rollouts, summary; written and read
    rollout_file  samples as columns and back
    metrics       rollouts and evaluations in numbers, under their published names
    tracking      where metrics go: record, W&B, TensorBoard
    timers        where the time of a process goes
    summary       the clock of a run, the content of summary.json
    display       live line or log lines for a person
    plots         the reward curve
    logging       log lines of a process
    versions      what produced the run
    files, lock, jsonable    whole files, one live run per directory, values as JSON

Import the module that is needed: none loads torch, numpy, pyarrow, rich or a plotting library before it uses it.
"""
