"""Adapters merged into one: what PEFT makes of them is asked, kept, and loads like any other adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trainer_child import DEMO, Child, evaluate_spec
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "down_proj"]


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()


def adapter(folder: Path, seed: int, r: int = 4, **options: Any) -> Path:
    """One with weights of its own, as if it had been trained."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base_model(), config)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, as PEFT itself loads and scales it."""
    plain = base_model().state_dict()
    tuned = PeftModel.from_pretrained(base_model(), folder).merge_and_unload().state_dict()
    return {name: tuned[name] - plain[name] for name in plain if any(target in name for target in TARGETS)}


def merge(child: Child, folders: list[Path], method: str, **options: Any) -> Any:
    members = {"name": "top", "trains": ["b.1", "b.2"], "method": method, **options}
    return child.run(evaluate_spec(members=members, evaluation={"metrics": ["likelihood"]}), members=folders)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_cat_and_svd_add_the_weighted_mean_of_what_the_members_add(
    child: Child, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    members = [adapter(tmp_path / f"a{n}", seed=n, r=r, **options) for n, r in enumerate((8, 2))]
    done = merge(child, members, method, weights=[0.75, 0.25])
    mine, theirs, found = deltas(members[0]), deltas(members[1]), deltas(done.folder / "adapter")
    for name, delta in found.items():
        wanted = 0.75 * mine[name] + 0.25 * theirs[name]
        if method == "svd":
            # Eckart and Young: none of rank 8, the larger of the two, comes closer
            least = torch.linalg.svdvals(wanted)[8:].square().sum().sqrt()
            assert (delta - wanted).norm() == pytest.approx(least.item(), rel=1e-3, abs=1e-5)
        else:
            torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5)
    assert (done.folder / "adapter" / "tokenizer.json").is_file()
    assert not (done.folder / "adapter" / "merged").exists()


def test_the_merged_adapter_scores_as_if_it_were_loaded_like_any_other(child: Child, tmp_path: Path) -> None:
    members = [adapter(tmp_path / f"a{n}", seed=n) for n in range(2)]
    for method, options in (("linear", {}), ("ties", {"density": 0.5}), ("dare_ties", {"density": 0.5})):
        done = merge(child, members, method, **options)
        spec = evaluate_spec(adapter_job="b.top", evaluation={"metrics": ["likelihood"]})
        files = [one.folder / "questions.jsonl" for one in (done, child.run(spec, adapter=done.folder / "adapter"))]
        scores = [[json.loads(line)["scores"] for line in file.open()] for file in files]
        assert len(scores[0]) == 24
        for mine, theirs in zip(*scores, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_the_base_model_is_what_it_was_after_a_merge(child: Child, tmp_path: Path) -> None:
    plain = child.run(evaluate_spec(evaluation={"metrics": ["likelihood"]}))
    merge(child, [adapter(tmp_path / f"a{n}", seed=n) for n in range(2)], "cat")
    before = child.log.read_text().count("still loaded")
    again = child.run(evaluate_spec(evaluation={"metrics": ["likelihood"]}))
    assert child.log.read_text().count("still loaded") == before + 1
    assert (plain.folder / "questions.jsonl").read_text() == (again.folder / "questions.jsonl").read_text()


def test_what_peft_refuses_is_said(child: Child, tmp_path: Path) -> None:
    members = [adapter(tmp_path / f"a{n}", seed=n, r=r) for n, r in enumerate((4, 8))]
    failure = merge(child, members, "linear").failure
    assert failure.reason == "bad_spec"
    assert failure.message.startswith("top: these adapters cannot be merged: All adapters must have the same r value")
