"""Plug-ins tried out: each called once without a run, on made-up or recorded samples, and what comes back judged.

    material   the samples: made of the run's own prompts, or read from a run directory (`recorded`)
    caller     one call after another, each within a time limit, all in one event loop
    watch      what a plug-in changed although it should only look
    reward     the reward and its lint; groups: filters, conversions, logging; training: loss, importance, reducer
    table      plug point -> its trial
    check      `miles check`: every pure plug-in of a run, one report
    replay     `miles replay`: one plug point on a recorded rollout

Binding is left to `miles.hooks`, the meaning of batches and losses to `miles.batch` and `miles.loss`. torch is imported
by `training` alone, for plug-ins that need it anyway.
"""
