"""A share of a point for each right digit of the answer, from the last one: 1216 for 1326 is worth a half.

    miles train --config examples/quickstart/carry.yaml --custom-rm-path examples/own_reward/reward.py:reward
"""


async def reward(args, sample):
    answer = sample.response.partition("</think>")[2].removesuffix("<eos>")
    right = sum(a == b for a, b in zip(reversed(answer), reversed(sample.label)))
    return right / max(len(answer), len(sample.label))
