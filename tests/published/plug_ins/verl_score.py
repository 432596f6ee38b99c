"""A reward file as it is written for verl."""

import re


def extract_solution(solution_str):
    numbers = re.findall(r"\d+", solution_str)
    return numbers[-1] if numbers else None


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    answer = extract_solution(solution_str)
    score = 0.0 if answer is None else sum(a == b for a, b in zip(answer, ground_truth)) / len(ground_truth)
    return {"score": score, "acc": answer == ground_truth, "split": (extra_info or {}).get("split")}


def compute_score_without_extra(data_source, solution_str, ground_truth):
    return float(data_source == "carry") + float(extract_solution(solution_str) == ground_truth)


def compute_score_with_settings(data_source, solution_str, ground_truth, extra_info, method="strict", **kwargs):
    return float(method == "strict" and extra_info["split"] == "train")
